"""Readout: a learned query for each region attends over the tokens, in the place of a dense head."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body, other
from gatecc.passes.branch.cross_attention import as_rows, flat
from gatecc.passes.operands import beside, place, static_sizes


@dataclass(frozen=True)
class Readout(Body, tag="readout"):
    """y_r = W_r sum_n a_rn x_n + b_r, a_r = softmax over tokens of q_r · x_n / sqrt(C), for each of the regions r.

    ``of`` is what is read, tokens (B, N, C) or a feature map (B, C, Y, X): ``at("block[-1].out")``. The outputs of the
    head are split among the regions, in their order: as many for each. q starts at 0, so that every region begins with
    the mean of the tokens. The features are frozen: no gradient goes into them, unless ``train_features``.
    """

    of: str
    regions: int
    train_features: bool = False

    def check(self) -> None:
        self.require(self.regions > 0, "regions", "a positive number")

    @property
    def ops(self) -> tuple[str, ...]:
        return ("lerp",)

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_parameters=True, same_for_layers=True)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        tokens = other(self.of, value, edit)
        outputs = static_sizes(value).get("c", 0)
        if value.axes != "bc" or not outputs or outputs % self.regions:
            raise SiteRefusedError(
                "a readout yields as many outputs for each region",
                where=place(site),
                found=f"{outputs} outputs with the axes {value.axes}, {self.regions} regions",
                expected="one row of outputs for each sample (bc), a multiple of the regions",
                do="select the head of a classifier or regressor, and choose another number of regions",
            )
        rows = edit.call(flat, tokens.node, as_rows(tokens, site), name="tokens")
        sizes = static_sizes(tokens)["c"], outputs
        path = edit.module("readout", lambda: beside(Regions(self, *sizes), edit))
        return edit.call(path, rows, name="readout")


class Regions(nn.Module):
    """The module of `Readout`: query (R, C), weight (R, K/R, C), bias (K,). x: (B, N, C) -> (B, K)."""

    def __init__(self, spec: Readout, channels: int, outputs: int) -> None:
        super().__init__()
        self.train_features = spec.train_features
        self.query = nn.Parameter(torch.zeros(spec.regions, channels))
        self.weight = nn.Parameter(torch.empty(spec.regions, outputs // spec.regions, channels))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.uniform_(self.weight, -(channels**-0.5), channels**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        x = (x if self.train_features else x.detach()).to(self.query.dtype)
        scores = torch.einsum("rc,bnc->brn", self.query, x) * x.size(-1) ** -0.5
        attended = scores.softmax(-1) @ x
        return torch.einsum("brc,rkc->brk", attended, self.weight).flatten(1) + self.bias
