"""Grains: blocks that run on fine tokens where an image has detail, and on one coarse token for each other region."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, exact
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import select
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import described_shape, on_example
from gatecc.passes.fewer_tokens import fewer
from gatecc.passes.operands import condition, place, stage
from gatecc.passes.zoom import grid_at_end

Grid = tuple[int, int]


def entropies(image: Tensor, grid: Grid, bins: int) -> Tensor:
    """The entropy of the values in each region, by a histogram of ``bins`` over the range of the image.

    image: (B, C, H, W) -> (B, R) for R = rows times columns regions
    """
    grey = image.detach().float().mean(1)
    low, high = grey.amin((1, 2), keepdim=True), grey.amax((1, 2), keepdim=True)
    bin_of = ((grey - low) / (high - low).clamp_min(1e-12) * bins).long().clamp(0, bins - 1)
    regions = bin_of.unflatten(2, (grid[1], -1)).unflatten(1, (grid[0], -1)).transpose(2, 3).flatten(3).flatten(1, 2)
    empty = grey.new_zeros(image.size(0), regions.size(1), bins)
    counts = empty.scatter_add(2, regions, torch.ones_like(regions, dtype=grey.dtype))
    p = counts / regions.size(2)
    return -(p * p.clamp_min(1e-12).log()).sum(-1)


def ordered(scores: Tensor, fine: int) -> Tensor:
    """The regions, first the ``fine`` with the largest scores, each part in the order of places. (B, R) -> (B, R)"""
    order = torch.argsort(scores, dim=1, descending=True, stable=True)
    return torch.cat([order[:, :fine].sort(1).values, order[:, fine:].sort(1).values], 1)


def _of_regions(x: Tensor, grid: Grid, size: int) -> Tensor:
    """(B, rows size columns size, C) -> (B, R, size size, C)"""
    x = x.unflatten(1, (grid[0], size, grid[1], size)).transpose(2, 3)
    return x.flatten(3, 4).flatten(1, 2)


def _picked(regions: Tensor, at: Tensor) -> Tensor:
    return torch.gather(regions, 1, at[:, :, None, None].expand(-1, -1, *regions.shape[2:]))


def mixed(x: Tensor, order: Tensor, fine: int, grid: Grid, size: int) -> Tensor:
    """What comes before the grid, the tokens of the fine regions, the mean of each coarse one.

    x: (B, N, C) -> (B, N - R size² + fine size² + (R - fine), C)
    """
    before = x.size(1) - grid[0] * grid[1] * size * size
    regions = _picked(_of_regions(x[:, before:], grid, size), order)
    return torch.cat([x[:, :before], regions[:, :fine].flatten(1, 2), regions[:, fine:].mean(2)], 1)


def spread(y: Tensor, order: Tensor, fine: int, grid: Grid, size: int) -> Tensor:
    """The inverse: each token of a coarse region is the region's. y as `mixed` yields it -> (B, N, C)"""
    cells, R = size * size, grid[0] * grid[1]
    before = y.size(1) - fine * cells - (R - fine)
    own, coarse = y[:, before : before + fine * cells], y[:, before + fine * cells :]
    all_of = [own.unflatten(1, (fine, cells)), coarse.unsqueeze(2).expand(-1, -1, cells, -1)]
    regions = _picked(torch.cat(all_of, 1), torch.argsort(order, 1))
    tokens = regions.unflatten(2, (size, size)).unflatten(1, grid).transpose(2, 3).flatten(1, 4)
    return torch.cat([y[:, :before], tokens], 1)


@dataclass(frozen=True)
class Grains(Rewrite):
    """Run the selected blocks, from the first to the last, on tokens of two grains.

    The tokens at the end of the sequence are a grid (``grid``: rows and columns; without, a square) that is cut into
    regions of ``size`` by ``size``. The ``ratio`` of the regions with the largest scores keep their tokens, the others
    are one token each, their mean; behind the last block it takes the place of each of them. Scores are the entropies
    of the regions of the model's first input, an image (B, C, H, W), in ``bins``; or ``map``, an input of the model
    (B, regions) whose largest numbers mark what is fine. With ratio 1 the model is the original, bitwise.
    """

    name = "grains"

    ratio: float = 0.5
    size: int = 2
    map: str = ""
    grid: tuple[int, ...] = ()
    bins: int = 32

    def __post_init__(self) -> None:
        object.__setattr__(self, "grid", tuple(self.grid))
        if not 0 <= self.ratio <= 1 or self.size < 2 or self.bins < 2 or len(self.grid) not in (0, 2):
            raise ArgumentError(
                "no such grains",
                found=f"ratio={self.ratio}, size={self.size}, bins={self.bins}, grid={self.grid}",
                expected="0 <= ratio <= 1, size >= 2, bins >= 2, grid=(rows, columns) or ()",
            )
        if self.site.kind != "block":
            raise ArgumentError("grains are of the tokens of blocks", found=str(self.site), expected="block[...]")

    def contract(self) -> Contract:
        return exact() if self.ratio == 1 else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=self.ratio < 1, loses_outputs=self.ratio < 1)

    def reads(self) -> tuple[str, ...]:
        return ("in", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        blocks = select(edit.selected or self.site, edit.sites)
        if self.ratio == 1 or site is not blocks[0]:
            return
        given, out = stage(site, "in"), stage(blocks[-1], "out")
        if given.axes != "bnc" or out.axes != "bnc" or not isinstance(shape(given.node)[1], int):
            raise SiteRefusedError(
                "only tokens in one sequence have grains",
                where=place(site),
                found=f"axes {given.axes} of ({described_shape(given.node)})",
                expected="(b, n, c), n the same in every call",
                do="select the blocks of one stage",
            )
        cells = grid_at_end(given, self.grid, site, edit)
        if cells[0] % self.size or cells[1] % self.size:
            raise SiteRefusedError(
                "the grid cannot be cut into regions",
                where=place(site),
                found=f"{cells[0]} x {cells[1]} tokens, regions of {self.size} x {self.size}",
                expected="a size that divides both",
            )
        grid = cells[0] // self.size, cells[1] // self.size
        fine = round(self.ratio * grid[0] * grid[1])
        if fine == grid[0] * grid[1]:
            return
        order = edit.call(ordered, self._scores(given, grid, site, edit), fine, name="order")
        tokens = edit.call(mixed, given.node, order, fine, grid, self.size, name="grains")
        found = fewer(edit, given.node, tokens, out.node, 1)
        edit.replace(out.node, edit.call(spread, found, order, fine, grid, self.size, name="spread"))
        edit.discard(out.node, inside=True)

    def _scores(self, value: Value, grid: Grid, site: Site, edit: Editor) -> fx.Node:
        node = condition(self.map, edit.program, value).node if self.map else edit.program.placeholders[0]
        sizes = [on_example(s) for s in shape(node)]
        fits = sizes[1:] == [grid[0] * grid[1]] if self.map else _divides(sizes, grid)
        if not fits:
            raise SiteRefusedError(
                "the regions have no scores",
                where=place(site),
                found=f"{node.name} ({described_shape(node)}), {grid[0]} x {grid[1]} regions",
                expected=f"(B, {grid[0] * grid[1]})" if self.map else "images (B, C, H, W) that the regions divide",
                do="name an input with a number for each region: map=NAME",
            )
        return node if self.map else edit.call(entropies, node, grid, self.bins, name="entropy")


def _divides(sizes: list[int | None], grid: Grid) -> bool:
    return len(sizes) == 4 and all(s and s % g == 0 for s, g in zip(sizes[2:], grid, strict=True))
