"""DistanceBias: a learned number for each head and distance, added to the scores."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc.ir.contract import Contract, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Attention
from gatecc.passes.attention_edit.change import Change
from gatecc.passes.attention_edit.scores import add_to_scores
from gatecc.passes.operands import beside, stage


@dataclass(frozen=True)
class DistanceBias(Change, tag="distance_bias"):
    """Scores s_ij + b_h(j - i): for each head h a learned number for each distance of a key from its query (T5, 2020).

    Distances beyond ``span`` on either side share one number. All start at 0, so that the model does. It holds for
    sequences of any length.
    """

    span: int = 64

    def check(self) -> None:
        self.require(self.span > 0, "span", "a positive integer")

    @property
    def reads(self) -> tuple[str, ...]:
        return ("q", "k")

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    @property
    def contract(self) -> Contract:
        return identity_at_init()

    def apply(self, site: Attention, label: str, edit: Editor) -> None:
        if site.cross or not site.heads:
            found = "queries and keys of different sequences" if site.cross else "heads whose number is not known"
            raise self.refused(site, found, "self-attention, in which distances are counted")
        path = edit.module(label, lambda: beside(Distances(site.heads, self.span), edit))
        q, k = stage(site, "q"), stage(site, "k")
        keys = "m" if "m" in k.axes else "n"
        bias = edit.call(path, q.node, k.node, q.axes.index("n"), k.axes.index(keys), name=label)
        add_to_scores(site, bias, self, edit)


class Distances(nn.Module):
    """The table (H, 2 span + 1) of `DistanceBias`. Queries and keys by their lengths -> (1, H, N, M)."""

    def __init__(self, heads: int, span: int) -> None:
        super().__init__()
        self.span = span
        self.table = nn.Parameter(torch.zeros(heads, 2 * span + 1))

    def forward(self, q: Tensor, k: Tensor, queries: int, keys: int) -> Tensor:
        """The bias of each pair."""
        n, m = (torch.arange(x.size(axis), device=q.device) for x, axis in ((q, queries), (k, keys)))
        distance = (m - n.unsqueeze(-1)).clamp(-self.span, self.span) + self.span
        return self.table[:, distance].unsqueeze(0)
