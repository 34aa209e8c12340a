"""reduced: reductions of rows that go by in blocks of columns, before the loop that reads what comes of them.

A norm in front of a product: its rows are read once for each reduction that waits for another (a mean, then the spread
around it), however long they are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from gatecc.codegen.regions.body import Body, Space, Value
from gatecc.codegen.regions.region import REDUCTIONS, RefusedError, Region, ancestors, name_of


@dataclass
class Reduced:
    """``lines`` before the main loop; ``known``: what they found, by node; ``passes``: how often rows are read."""

    lines: list[str] = field(default_factory=list[str])
    known: dict[fx.Node, Any] = field(default_factory=dict[fx.Node, Any])
    passes: int = 0


def print_reduced(
    region: Region, space: Space, wanted: Sequence[fx.Node], loop: Callable[[list[str]], list[str]]
) -> Reduced:
    """The reductions that ``wanted`` values need. ``loop``: lines around those of a block. Raises RefusedError."""
    needed = ancestors(wanted)
    pending = [n for n in region.calls if n in needed and name_of(n) in REDUCTIONS]
    found, means = Reduced(), dict[fx.Node, Value]()
    while pending:
        ready = [n for n in pending if not (ancestors([n]) - {n}).intersection(pending)]
        body = Body(region, space, found.known, in_blocks=True)
        sums = [_Sum(body, n, means.get(n)) for n in ready]
        found.lines += [*body.outside, *(s.begun for s in sums)]
        found.lines += [*loop([*body.lines, *(s.added for s in sums)]), *(line for s in sums for line in s.ended)]
        found.known |= body.shared()
        found.passes += 1
        for one in sums:
            if one.whole is None:
                means[one.node] = one.mean
            else:
                found.known[one.node] = one.whole
        pending = [n for n in pending if n not in found.known]
    return found


class _Sum:
    """One reduction in one pass. ``whole``: its value, None if there was only its mean."""

    def __init__(self, body: Body, node: fx.Node, mean: Value | None) -> None:
        self.node, name = node, name_of(node)
        given = body.value(node.args[0])  # pyright: ignore[reportArgumentType]
        if given.kind != "tile" or given.literal:
            raise RefusedError(f"{name} over columns that are all the same")
        own, width, there = body.name(node), body.space.width, f"{body.space.col_mask}[None, :]"
        self.ended = list[str]()
        if name in ("amax", "amin"):
            away = "float('-inf')" if name == "amax" else "float('inf')"
            self.begun = f"{own} = tl.full((BLOCK_ROWS, 1), {away}, tl.float32)"
            block = f"tl.{name[1:]}(tl.where({there}, {given.text}, {away}), 1)[:, None]"
            self.added = f"{own} = tl.{name[1:]}imum({own}, {block})"
            self.whole: Any = Value(own, "column")
            return
        spreads = name in ("var", "var_mean")
        into = f"{own}_mean" if spreads and mean is None else own
        one = given.text if mean is None else f"({given.text} - {mean.text}) * ({given.text} - {mean.text})"
        self.begun = f"{into} = tl.zeros((BLOCK_ROWS, 1), tl.float32)"
        self.added = f"{into} += tl.sum(tl.where({there}, {one}, 0.0), 1)[:, None]"
        self.mean, self.whole = Value(into, "column"), None
        if spreads and mean is None:
            self.ended = [f"{into} = {into} / {width}.0"]
            return
        if spreads:
            correction: Any = node.kwargs.get("correction", 1)
            self.ended = [f"{own} = {own} / {max(0.0, width - (1.0 if correction is None else correction))}"]
        elif name == "mean":
            self.ended = [f"{own} = {own} / {width}.0"]
        value = Value(own, "column")
        self.whole = (value, mean) if name == "var_mean" else value
