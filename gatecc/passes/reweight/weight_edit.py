"""WeightEdit: what `Reweight` may do to the weights of a site, or of all sites together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.option import Option
from gatecc.ir.site import Site
from gatecc.ir.weights import Effect


@dataclass(frozen=True)
class WeightEdit(Option, slot="edit"):
    """Base of the edits. One of numbers alone writes ``at``; one that the graph must know writes ``build``."""

    @property
    def contract(self) -> Contract:
        """What it promises of the model's function."""
        return changes_function()

    @property
    def effects(self) -> Effects:
        """What it gives up and needs. An edit of numbers is done ``in_python`` and ``reads_sites``."""
        return Effects(in_python=True, reads_sites=True)

    def at(self, model: nn.Module, sites: Sequence[Site]) -> Sequence[Effect]:
        """The effects on the weights of sites, which are looked at together."""
        raise NotImplementedError

    def build(self, site: Site, edit: Editor) -> None:
        """Edit the graph at one site."""
        raise NotImplementedError
