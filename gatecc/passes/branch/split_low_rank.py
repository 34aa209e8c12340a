"""Low-rank adapters whose factors are mixed before they are multiplied, in splits of their channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.program import shape
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Adapting, Bank, operand
from gatecc.passes.operands import beside, place


@dataclass(frozen=True)
class SplitLoras(Adapting, Bank, tag="split_loras"):
    """y <- y + alpha/rank * B A x, where A and B are themselves mixtures of those of the experts.

    A and B are cut into ``splits`` parts, A by its inputs and B by its outputs; part s is sum_e g_(s, e) times the
    expert's. The weights g are one for each split and expert and the same for all tokens of a sample: the gate reads a
    task. With one split that is Poly; equal weights give the mean adapter. Every B starts at 0.
    """

    splits: int = 1
    rank: int = 8
    alpha: float = 16.0
    of: str = "in"

    @property
    def scores(self) -> int:
        return self.splits * self.experts

    def check(self) -> None:
        super().check()
        self.require(self.splits > 0, "splits", "a positive integer")
        self.require(self.rank > 0, "rank", "a positive integer")

    def mix(self, site: Site, value: Value, edit: Editor, weights: fx.Node, indices: fx.Node | None = None) -> fx.Node:
        source, channels, width = operand(site, value, self.of)
        if channels % self.splits or width % self.splits:
            raise SiteRefusedError(
                "the splits are not of one size",
                where=place(site),
                found=f"{channels} channels in, {width} out, {self.splits} splits",
                expected="splits that divide both",
            )
        if indices is not None or any(size != 1 for size in shape(weights)[1:-1]):
            raise SiteRefusedError(
                "factors are mixed once for all tokens of a sample",
                where=place(site),
                found="weights for each token",
                expected='a gate that varies over samples only: "cond(task), lookup(3), expert, normalized"',
                do="use the body loras, whose weights may differ from token to token",
            )
        path = edit.module("loras", lambda: beside(SplitLowRanks(self, channels, width), edit))
        return edit.call(path, source.node, weights, name="loras")


class SplitLowRanks(nn.Module):
    """The factors a (S, E, C/S, rank) and b (S, E, rank, O/S) of E adapters in S splits.

    x: (B, ..., C), weights: (B or 1, ..., S E) -> (B, ..., O).
    """

    def __init__(self, spec: SplitLoras, channels: int, width: int) -> None:
        super().__init__()
        self.splits, self.scale = spec.splits, spec.alpha / spec.rank
        self.a = nn.Parameter(torch.empty(spec.splits, spec.experts, channels // spec.splits, spec.rank))
        self.b = nn.Parameter(torch.zeros(spec.splits, spec.experts, spec.rank, width // spec.splits))
        nn.init.uniform_(self.a, -math.sqrt(1 / channels), math.sqrt(1 / channels))

    def forward(self, x: Tensor, weights: Tensor) -> Tensor:
        w = weights.reshape(weights.size(0), self.splits, -1).to(self.a.dtype)
        a = torch.einsum("bse,secr->bscr", w, self.a).flatten(1, 2)
        b = torch.einsum("bse,sero->brso", w, self.b).flatten(2)
        rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2)
        return ((rows @ a * self.scale) @ b).view(*x.shape[:-1], b.size(-1))
