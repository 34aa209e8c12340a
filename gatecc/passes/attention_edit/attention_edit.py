"""AttentionEdit: change what the queries of an attention see, how they score it, or what they make of it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.operands import place


@dataclass(frozen=True)
class AttentionEdit(Rewrite):
    """Change the scores of an attention, the keys that its queries see, or the set of its keys and values.

    ``change`` says what is done; it edits the site as a whole, so no stage of it is selected. The projections, the mask
    and the positions of the tokens stay. ``label`` names the module with new parameters on the owner.
    """

    name = "attention_edit"

    change: Change
    label: str = "edit"

    def __post_init__(self) -> None:
        if self.site.kind != "attention" or self.site.stage != "heads":
            raise ArgumentError(
                "an edit of attention changes it as a whole", found=str(self.site), expected="attention[...], no stage"
            )

    def effects(self) -> Effects:
        return self.change.effects

    def contract(self) -> Contract:
        return self.change.contract

    def reads(self) -> Iterable[str]:
        return (self.site.stage, *self.change.reads)

    def notes(self, site: Site) -> Iterable[str]:
        return self.change.notes(site) if isinstance(site, Attention) else ()

    def rewrite(self, site: Site, edit: Editor) -> None:
        if not isinstance(site, Attention) or site.over != "tokens":
            raise SiteRefusedError(
                "an edit of attention needs tokens that attend to tokens",
                where=place(site),
                found=f"attention between {site.over}" if isinstance(site, Attention) else f"a site of {site.kind}",
                do="leave this site out",
            )
        self.change.apply(site, self.label, edit)
