"""Reweight: change the weights of a model where a site has them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from gatecc.ir.contract import Contract
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Site
from gatecc.ir.weights import Effect
from gatecc.passes.reweight.weight_edit import WeightEdit


@dataclass(frozen=True)
class Reweight(Rewrite):
    """Edit weights: ``shift`` adds a direction to the rows of MLP projections that lie against it, ``groups`` masks
    products between groups of units, ``SvdSplit`` (a rewrite of its own) makes singular parts of a matrix.

    An edit that changes numbers alone leaves every module its own forward: no graph takes its place, and what it costs
    to run stays the same. One that masks is known to the graph, and what is masked costs nothing.

    Merging adapters is `gatecc.adapters`, pruning single weights or rows `torch.nn.utils.prune`, quantising `torchao`:
    these work on a model before or after, and nothing here does them again.
    """

    name = "reweight"

    edit: WeightEdit

    def contract(self) -> Contract:
        return self.edit.contract

    def effects(self) -> Effects:
        return self.edit.effects

    def edit_at(self, model: nn.Module, sites: Sequence[Site]) -> Sequence[Effect]:
        return self.edit.at(model, sites)

    def rewrite(self, site: Site, edit: Editor) -> None:
        self.edit.build(site, edit)
