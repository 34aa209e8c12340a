"""Latent: exits on a branch of latent codes that reads the model's features and writes back to them (Dyn-Perceiver)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.ir.axes import Axes
from gatecc.ir.edit import Editor
from gatecc.ir.gates.layout import channels_last
from gatecc.ir.program import META, origin
from gatecc.ir.site import Site, Value
from gatecc.passes.exit.head import LABEL, Built, ExitHead, sizes_of
from gatecc.passes.operands import beside, stage

_CODES = "latent_codes"


@dataclass(frozen=True)
class Latent(ExitHead, tag="latent"):
    """``codes`` latent vectors of ``width`` that go from exit to exit beside the model.

    At each exit they attend to what the block yields and pass an MLP; the logits are W LN(z), z their mean. With
    ``writes`` the features attend to the codes in turn, x <- x + A(x, z), whose last matrix starts at 0, so that the
    model starts as it was. Codes start at learned values at the first exit. Padding is attended to as well.
    """

    codes: int = 8
    width: int = 64
    heads: int = 4
    writes: bool = True

    @property
    def pools_tokens(self) -> bool:
        return True

    def check(self) -> None:
        self.require(self.codes > 0, "codes", "a positive number")
        self.require(self.heads > 0 and self.width % self.heads == 0, "width", "a multiple of the heads")

    def build(self, site: Site, logits: Value, edit: Editor) -> Built:
        value = stage(site, "out")
        channels, classes = sizes_of(value, logits, site)
        before = _codes_before(value.node, edit)
        path = edit.module(
            LABEL, lambda: beside(LatentStage(self, value.axes, channels, classes, before is None), edit)
        )
        found = edit.call(path, value.node, *([] if before is None else [before]), name=LABEL)
        early, z, *written = found
        z.meta[META] = replace(origin(z), inserted_by=_CODES)
        if written:
            edit.replace(value.node, written[0])
        return Built(early, (z, *(written or [value.node])))


def _codes_before(here: fx.Node, edit: Editor) -> fx.Node | None:
    """The codes that the exit before leaves, if there is one."""
    found = [n for n in edit.program.calls() if origin(n).inserted_by == _CODES and n < here]
    return max(found, default=None)


class LatentStage(nn.Module):
    """The module of one exit. x in the order of ``axes``, z: (B, L, D) -> logits (B, C), z, and x if it is written."""

    def __init__(self, head: Latent, axes: Axes, channels: int, classes: int, first: bool) -> None:
        super().__init__()
        self.axes = axes
        self.codes = nn.Parameter(torch.randn(head.codes, head.width) * 0.02) if first else None
        self.read = CrossAttention(head.width, channels, head.width, head.heads)
        self.norm = nn.LayerNorm(head.width)
        self.mlp = nn.Sequential(
            nn.Linear(head.width, 2 * head.width), nn.GELU(), nn.Linear(2 * head.width, head.width)
        )
        self.last = nn.LayerNorm(head.width)
        self.out = nn.Linear(head.width, classes)
        self.write = CrossAttention(channels, head.width, head.width, head.heads) if head.writes else None
        if self.write is not None:
            nn.init.zeros_(self.write.out.weight)
            nn.init.zeros_(self.write.out.bias)

    def forward(self, x: Tensor, z: Tensor | None = None) -> tuple[Tensor, ...]:
        features, at = channels_last(x, self.axes, {})
        rows = features.flatten(1, -2) if len(at) > 1 else features.unsqueeze(1)
        before = self.codes.expand(x.size(0), -1, -1) if self.codes is not None else z
        assert before is not None
        code: Tensor = before + self.read(before, rows)
        code = code + self.mlp(self.norm(code))
        logits = self.out(self.last(code).mean(1))
        if self.write is None:
            return logits, code
        added = self.write(rows, code).reshape(features.shape)
        order = [(*at, "c").index(axis) for axis in self.axes.text]
        return logits, code, x + added.permute(order)


class CrossAttention(nn.Module):
    """Each row of x attends to the rows of y. x: (B, N, C), y: (B, M, E) -> (B, N, C)"""

    def __init__(self, channels: int, given: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm, self.given_norm = nn.LayerNorm(channels), nn.LayerNorm(given)
        self.q, self.kv = nn.Linear(channels, width), nn.Linear(given, 2 * width)
        self.out = nn.Linear(width, channels)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        q = self.q(self.norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        kv = self.kv(self.given_norm(y)).unflatten(-1, (2, self.heads, -1))
        k, v = kv.permute(2, 0, 3, 1, 4).unbind(0)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
