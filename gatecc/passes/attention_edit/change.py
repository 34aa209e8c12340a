"""Change: what an edit of attention can be. One file beside this one for each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.option import Option
from gatecc.ir.site import Attention, Site
from gatecc.passes.operands import place


@dataclass(frozen=True)
class Change(Option, slot="change"):
    """Base of what an edit of attention can be."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Stages of the site beside the heads."""
        return ()

    @property
    def effects(self) -> Effects:
        """What the edit gives up, needs and promises."""
        return Effects()

    @property
    def contract(self) -> Contract:
        """What it promises of the model's function."""
        return changes_function()

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        """Edit the graph at one site. ``label`` names the module with new parameters on the owner."""
        raise NotImplementedError

    def notes(self, site: Attention) -> Iterable[str]:
        """What a report should say of it, see `Rewrite.notes`."""
        return ()

    def refused(self, site: Site, found: str, expected: str, do: str = "leave this site out") -> SiteRefusedError:
        """The error for a site that cannot take the edit."""
        return SiteRefusedError(
            f"{self.tag} does not fit this attention", where=place(site), found=found, expected=expected, do=do
        )
