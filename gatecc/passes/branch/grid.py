"""GridConv: a depthwise convolution over tokens that are the cells of a grid, such as the patches of an image."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isqrt
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import shape
from gatecc.ir.site import Attention, Site, Value
from gatecc.ir.sizes import on_example
from gatecc.passes.axes import arranged
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import beside, place, stage, static_sizes


@dataclass(frozen=True)
class GridConv(Body, tag="grid_conv"):
    """A depthwise convolution with a ``kernel`` by ``kernel`` window over tokens in rows, then ``activation``.

    It reads the value itself, or the stage ``of``. The first ``prefix`` tokens, such as a class token or a text, are
    not in the grid: they get 0, or what was read with ``rest="keep"``. The others fill ``rows`` by ``columns`` cells;
    where these are 0 the grid is a square. ``start="zero"`` begins with a window of zeros. Other numbers of tokens are
    other grids with the same window; what fills none is refused.
    """

    kernel: int = 3
    activation: Literal["none", "silu"] = "none"
    of: str = "self"
    prefix: int = 0
    rows: int = 0
    columns: int = 0
    rest: Literal["zero", "keep"] = "zero"
    bias: bool = True
    start: Literal["random", "zero"] = "random"

    def check(self) -> None:
        self.require(self.kernel > 0 and self.kernel % 2 == 1, "kernel", "an odd number, so that a window has a centre")
        self.require(self.prefix >= 0, "prefix", "a number of tokens")
        self.require(self.rows >= 0 and (self.rows > 0) == (self.columns > 0), "rows", "given with columns, or both 0")

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.of == "self" else (self.of,)

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    @property
    def starts_at_zero(self) -> bool:
        return self.start == "zero" and self.rest == "zero"

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        source = value if self.of == "self" else stage(site, self.of)
        if isinstance(site, Attention) and (site.mask.padding or site.mask.kind != "bidirectional"):
            raise SiteRefusedError(
                "a convolution over a grid reads what this mask hides",
                where=place(site),
                found=f"the mask is {site.mask}",
                expected="a bidirectional mask without padding",
                do="leave the convolution out, or this site",
            )
        channels = static_sizes(source).get("c")
        if sorted(source.axes) != sorted("bnc") or channels is None:
            raise SiteRefusedError(
                "only tokens in one sequence can be laid out as a grid",
                where=place(site),
                found=f"axes {source.axes}",
                expected="bnc in some order",
                do="read another stage, or leave this site out",
            )
        rows, columns = self.cells(edit.pin(source.node, source.axes.index("n")), site)

        def make() -> nn.Module:
            return beside(GridConvolution(self, channels), edit)

        tokens = source.node if source.axes == "bnc" else edit.call(arranged, source.node, source.axes.text, "bnc")
        found = edit.call(edit.module("local", make), tokens, rows, columns, name="local")
        return self._laid(found, value, site, edit)

    def notes(self, site: Site, value: Value) -> Iterable[str]:
        """Tokens that are taken for a square of patches because their number is one."""
        read = value if self.of == "self" else site.find(self.of)
        if self.rows or read is None or "n" not in read.axes:
            return
        tokens = on_example(shape(read.node)[read.axes.index("n")])
        if tokens is not None and (side := isqrt(max(tokens - self.prefix, 0))) ** 2 == tokens - self.prefix > 0:
            behind = f" behind {self.prefix}" if self.prefix else ""
            yield (
                f"the {side * side} tokens{behind} are taken for an image of {side} rows of {side} patches: "
                "rows= and columns= say what they are, prefix= how many come before"
            )

    def cells(self, tokens: int, site: Site) -> tuple[int, int]:
        """Rows and columns of the grid; SiteRefusedError if the tokens fill none."""
        count = tokens - self.prefix
        rows, columns = (self.rows, self.columns) if self.rows else (isqrt(max(count, 0)),) * 2
        if count > 0 and rows * columns == count:
            return rows, columns
        shape = f"{rows} rows of {columns}" if self.rows else "a square"
        raise SiteRefusedError(
            "the tokens do not fill the grid",
            where=place(site),
            found=f"{tokens} tokens, {self.prefix} of them before the grid",
            expected=f"tokens for {shape}",
            do="set prefix (a class token is 1), and rows and columns where the grid is no square",
        )

    def _laid(self, found: fx.Node, value: Value, site: Site, edit: Editor) -> fx.Node:
        """(B, N, C) in the axes of the value: split into heads where it has them."""
        axes = value.axes.renamed("m", "n")
        if sorted(axes) == sorted("bnc"):
            return found if axes == "bnc" else edit.call(arranged, found, "bnc", axes.text)
        heads = _heads(value, site)
        width = static_sizes(value).get("d", 0)
        if heads * width != found.meta["val"].size(-1) or set(axes.apart) - set("bnhdr"):
            raise SiteRefusedError(
                "the convolution has other channels than the value that it is added to",
                where=place(site),
                found=f"{found.meta['val'].size(-1)} channels, a value with axes {axes}: {heads} heads of {width}",
                expected="as many channels in both",
                do="read another stage, or leave this site out",
            )
        groups = heads // site.kv_heads if isinstance(site, Attention) and "r" in axes else 1
        return edit.call(arranged, found, "bnc", axes.text, heads, groups)


def _heads(value: Value, site: Site) -> int:
    """How many heads a value has, those that share a key counted apart."""
    if not isinstance(site, Attention):
        return 0
    return site.kv_heads if any(value is site.find(name) for name in ("k", "k_raw", "v")) else site.heads


class GridConvolution(nn.Module):
    """The module of `GridConv`."""

    def __init__(self, spec: GridConv, channels: int) -> None:
        super().__init__()
        self.spec = spec
        self.conv = nn.Conv2d(
            channels, channels, spec.kernel, padding=spec.kernel // 2, groups=channels, bias=spec.bias
        )
        if spec.start == "zero":
            for p in self.conv.parameters():
                nn.init.zeros_(p)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x: (B, N, C) -> (B, N, C)."""
        if not self.spec.prefix:
            return self._local(x, rows, columns)
        before, cells = x[:, : self.spec.prefix], x[:, self.spec.prefix :]
        found = self._local(cells, rows, columns)
        return torch.cat([before if self.spec.rest == "keep" else torch.zeros_like(before), found], 1)

    def _local(self, cells: Tensor, rows: int, columns: int) -> Tensor:
        found = self.conv(cells.transpose(1, 2).unflatten(-1, (rows, columns))).flatten(2).transpose(1, 2)
        return F.silu(found) if self.spec.activation == "silu" else found
