"""CrossAttention: the tokens of a site attend to another stream: a text, a modality, another encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body, elsewhere, operand, other
from gatecc.passes.operands import beside, condition, place, static_sizes


@dataclass(frozen=True)
class CrossAttention(Body, tag="cross_attention"):
    """W softmax(q k^T / sqrt(D)) v: queries from the site's ``query``, keys and values from ``of``.

    ``of`` is a value of another site, ``at("block[text.*].out")`` (the k-th for the k-th), or an input of the model,
    ``cond(text)``: tokens (B, M, C), a map (B, C, Y, X), or one vector (B, C) for each sample, which takes all of the
    attention: q and k then learn nothing. ``mask`` names an input (B, M), 0 at its padding. With ``start="zero"`` W
    starts at 0.
    """

    of: str
    heads: int = 4
    query: str = "self"
    mask: str = ""
    start: Literal["random", "zero"] = "random"

    def check(self) -> None:
        self.require(self.heads > 0, "heads", "a positive number")

    @property
    def reads(self) -> tuple[str, ...]:
        own = (self.query, *(() if elsewhere(self.of) else (self.of,)))
        return tuple(name for name in own if name != "self")

    @property
    def effects(self) -> Effects:
        return Effects(whole_model=elsewhere(self.of) or bool(self.mask), loses_cache=True, same_for_layers=True)

    @property
    def starts_at_zero(self) -> bool:
        return self.start == "zero"

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source, channels, width = operand(site, value, self.query)
        memory = other(self.of, value, edit)
        if channels % self.heads:
            raise SiteRefusedError(
                "the heads do not divide the channels of the queries",
                where=place(site),
                found=f"{channels} channels, {self.heads} heads",
                do="choose another number of heads",
            )
        tokens = edit.call(flat, memory.node, as_rows(memory, site), name="memory")
        padding = condition(self.mask, edit.program, value).node if self.mask else None
        sizes = channels, static_sizes(memory)["c"], width
        path = edit.module("cross", lambda: beside(Cross(self, *sizes), edit))
        return edit.call(path, source.node, tokens, *(() if padding is None else (padding,)), name="cross")


def as_rows(value: Value, site: Site) -> tuple[int, ...]:
    """The order that brings the axes of a stream to samples, places, channels. Raises SiteRefusedError for others."""
    axes = value.axes
    if (
        axes.text.count("b") == axes.text.count("c") == 1
        and "c" in static_sizes(value)
        and not set(axes) & set("hrdeg")
    ):
        places = "".join(letter for letter in axes if letter not in "bc")
        return tuple(axes.order(f"b{places}c"))
    raise SiteRefusedError(
        "another stream is read as the tokens of each sample",
        where=place(site),
        found=f"{value.node.name} with the axes {axes}",
        expected="samples, places and a fixed number of channels, such as bnc, bcyx or bc",
        do="read another value of the stream",
    )


def flat(x: Tensor, order: tuple[int, ...]) -> Tensor:
    """x, permuted to (B, ..., C) -> (B, M, C); one vector for each sample is one token."""
    x = x if order == tuple(range(x.dim())) else x.permute(order)
    return x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2) if x.dim() > 3 else x


class Cross(nn.Module):
    """The module of `CrossAttention`. x: (B, ..., C), memory: (B, M, C'), mask: (B, M) -> (B, ..., O)."""

    def __init__(self, spec: CrossAttention, channels: int, memory: int, width: int) -> None:
        super().__init__()
        self.heads = spec.heads
        self.q = nn.Linear(channels, channels, bias=False)
        self.k, self.v = (nn.Linear(memory, channels, bias=False) for _ in range(2))
        self.out = nn.Linear(channels, width, bias=False)
        if spec.starts_at_zero:
            nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        rows = x.unsqueeze(1) if x.dim() == 2 else x.flatten(1, -2) if x.dim() > 3 else x
        memory = memory.to(self.k.weight.dtype)
        q, k, v = (
            p(t).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for p, t in ((self.q, rows), (self.k, memory), (self.v, memory))
        )
        keep = None if mask is None else mask.bool()[:, None, None, :]
        y = self.out(F.scaled_dot_product_attention(q, k, v, keep).transpose(1, 2).flatten(2))
        return y.reshape(*x.shape[:-1], y.size(-1))
