"""heads_epilogue: what is made of attention's heads before anything else is done with them, as a function of the heads.

Pointwise operators in whatever order the axes lie, and norms of each head along its channels, with what only these read
(the activation of a gate). In the graph heads lie as (B, H, N, E), as tokens (B, N, H, E) or flat (B, N, H E); the
function takes and gives (B, H, N, E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import SAME_SHAPE, argument, mutates, opname
from gatecc.ir.program import fake
from gatecc.ir.sizes import same
from gatecc.ops.generated import CASTS, POINTWISE, REDUCED, ROWWISE

Layout = Literal["heads", "tokens", "flat"]
"""Of a result where it meets its gate: (B, H, N, E), (B, N, H, E), (B, N, H E)."""
_FLATTENS = frozenset("view reshape _unsafe_view flatten".split())


@dataclass(frozen=True)
class Epilogue:
    """``members``: nodes in order, of which only the last is read outside; ``layouts``: how what they yield lies;
    ``others``: the tensors that they read besides the heads."""

    core: fx.Node
    members: tuple[fx.Node, ...]
    layouts: dict[fx.Node, Layout]
    others: tuple[fx.Node, ...]

    @property
    def last(self) -> fx.Node:
        return self.members[-1]

    @property
    def computed(self) -> list[fx.Node]:
        """Without those that move axes."""
        return [n for n in self.members if not _moves(n)]

    def layout_of(self, other: fx.Node) -> Layout:
        """How a tensor lies that members read."""
        return next(self.layouts[m] for m in self.computed if other in m.all_input_nodes)

    def function(self) -> fx.GraphModule:
        """Of heads (B, H, N, E) and the others, axes moved likewise."""
        graph = fx.Graph()
        copied = {self.core: graph.placeholder("heads")}
        for i, node in enumerate(self.others):
            copied[node] = graph.placeholder(f"x{i + 1}")
        for node in self.members:
            first = node.all_input_nodes[0]
            copied[node] = copied[first] if _moves(node) else graph.node_copy(node, copied.__getitem__)
        graph.output(copied[self.last])
        return fx.GraphModule({}, graph)

    def written(self, flow: Flow) -> fx.Node | None:
        """A tensor that is another one where the last of it stands than where it was read."""
        order = flow.order
        for node in self.members:
            for read in node.all_input_nodes:
                writers = flow.writers.get(flow.base[read], ())
                if any(order[node] < order[w] < order[self.last] for w in writers):
                    return read
        return None


def epilogue_of(core: fx.Node, flow: Flow) -> Epilogue | str:
    """What is made of a fused attention's heads; or why no kernel computes it behind them."""
    heads = fake(core)
    fixed: Any = () if heads is None or heads.dim() != 4 else (heads.size(1), heads.size(3))
    if heads is None or not fixed or not all(isinstance(size, int) for size in fixed):
        return "the heads are not an axis of a known size"
    layouts: dict[fx.Node, Layout] = {core: "heads"}
    for node in sorted(_below(core, flow), key=flow.order.__getitem__):
        layout = _layout(node, layouts, heads)
        if layout is not None:
            layouts[node] = layout
    members = {n for n in layouts if n is not core}
    while members and not _ends(last := max(members, key=flow.order.__getitem__), members, core):
        members.remove(last)
    if not members:
        readers = ", ".join(sorted({opname(n) for n in core.users}))
        return f"nothing is made of the heads alone by operators that are printed ({readers} reads them)"
    layouts = {n: layouts[n] for n in members}
    _add_what_only_they_read(members, layouts, core)
    ordered = tuple(sorted(members, key=flow.order.__getitem__))
    read = dict[fx.Node, set[Layout]]()
    for node in ordered:
        for n in () if _moves(node) else node.all_input_nodes:
            if n not in members and n is not core:
                read.setdefault(n, set()).add(layouts[node])
    if any(len(found) > 1 for found in read.values()):
        return "a tensor meets the heads in two orders of their axes"
    return Epilogue(core, ordered, layouts, tuple(read))


def in_heads(x: Tensor, layout: Layout, heads: int, width: int) -> Tensor:
    """A tensor that broadcasts to a layout, so that it broadcasts to (B, H, N, E)."""
    if not x.dim() or layout == "heads":
        return x
    if layout == "flat":
        x = x.unsqueeze(-1) if x.size(-1) == 1 else x.unflatten(-1, (heads, width))
    return x if x.dim() == 1 else x[(None,) * (4 - x.dim())].transpose(1, 2)


def moved(node: fx.Node, layout: Layout, heads: Tensor) -> Layout | None:
    """How the result lies behind an operator that moves it; None if it does anything else."""
    name, value = opname(node), fake(node)
    if value is None:
        return None
    if name in SAME_SHAPE - {"detach"}:
        return layout
    if layout == "heads" and name == "transpose" and {a % 4 for a in node.args[1:3] if isinstance(a, int)} == {1, 2}:
        return "tokens"
    if layout == "heads" and name == "permute" and node.args[1] in ([0, 2, 1, 3], (0, 2, 1, 3)):
        return "tokens"
    if layout == "tokens" and name in _FLATTENS and value.dim() == 3:
        whole = same(value.size(0), heads.size(0)) and same(value.size(1), heads.size(2))
        return "flat" if whole and same(value.size(2), heads.size(1) * heads.size(3)) else None
    return None


def _moves(node: fx.Node) -> bool:
    return opname(node) in {"transpose", "permute"} | _FLATTENS | SAME_SHAPE


def _below(core: fx.Node, flow: Flow) -> set[fx.Node]:
    """What comes of the heads by pointwise operators, norms and moves."""
    found, todo = set[fx.Node](), list(core.users)
    while todo and len(found) < 64:
        node = todo.pop()
        if node in found or node not in flow.order or not (_moves(node) or _printed(node)):
            continue
        found.add(node)
        todo += node.users
    return found


def _printed(node: fx.Node) -> bool:
    value = fake(node)
    known = (*POINTWISE, *CASTS, *ROWWISE, *REDUCED)
    return opname(node) in known and value is not None and value.is_floating_point() and not mutates(node)


def _layout(node: fx.Node, layouts: dict[fx.Node, Layout], heads: Tensor) -> Layout | None:
    """How the result of a node lies that reads heads; None if it is not to be printed behind them."""
    read = [n for n in node.all_input_nodes if n in layouts]
    if len({layouts[n] for n in read}) != 1:
        return None
    layout = layouts[read[0]]
    if _moves(node):
        return moved(node, layout, heads)
    sizes, flat = _sizes(layout, heads), layout == "flat"
    if not (_has(node, sizes) or (not flat and _has(node, [*sizes[:-1], 1]))):
        return None
    if not all(_broadcasts(n, sizes) for n in node.all_input_nodes):
        return None
    if opname(node) in (*POINTWISE, *CASTS):
        return layout
    return layout if not flat and node.args[0] in read and _of_channels(node) else None


def _sizes(layout: Layout, heads: Tensor) -> list[Any]:
    B, H, N, E = heads.shape
    return {"heads": [B, H, N, E], "tokens": [B, N, H, E], "flat": [B, N, H * E]}[layout]


def _has(node: fx.Node, sizes: Sequence[Any]) -> bool:
    """Whether a value has these sizes."""
    value = fake(node)
    return value is not None and value.dim() == len(sizes) and all(map(same, value.shape, sizes))


def _broadcasts(node: fx.Node, sizes: Sequence[Any]) -> bool:
    """Whether a value broadcasts to these sizes."""
    value = fake(node)
    if value is None or value.dim() > len(sizes):
        return False
    return all(same(a, 1) or same(a, b) for a, b in zip(value.shape[::-1], sizes[::-1], strict=False))


def _of_channels(node: fx.Node) -> bool:
    """Whether an operator on rows goes along the channels of a head, and keeps the axis."""
    name, value = opname(node), fake(node)
    source: Any = node.args[0]
    given = fake(source)
    if value is None or given is None:
        return False
    if name.endswith("norm"):
        return argument(node, 1, "normalized_shape") in ([given.size(-1)], (given.size(-1),))
    axes: Any = argument(node, 1, "dim")
    axes = list(axes) if isinstance(axes, list | tuple) else [axes]
    return axes in ([-1], [3]) and value.dim() == 4


def _ends(node: fx.Node, members: set[fx.Node], core: fx.Node) -> bool:
    """Whether the epilogue may end here: with a value like the heads, and no other that is read outside."""
    value, heads = fake(node), fake(core)
    if value is None or heads is None or _moves(node) or value.dtype != heads.dtype:
        return False
    within = all(u in members for n in (core, *members) if n is not node for u in n.users)
    return within and same(value.numel(), heads.numel())


def _add_what_only_they_read(members: set[fx.Node], layouts: dict[fx.Node, Layout], core: fx.Node) -> None:
    """Pointwise operators on what the heads meet, such as the activation of a gate."""
    read_by = {n: m for m in members for n in m.all_input_nodes}
    todo = list(read_by)
    while todo:
        node = todo.pop()
        layout = layouts[read_by[node]]
        value, name = fake(node), opname(node)
        if node in members or node is core or value is None or node.op != "call_function" or mutates(node):
            continue
        axes = 3 if layout == "flat" else 4
        if name not in (*POINTWISE, *CASTS) or value.dim() != axes or not value.is_floating_point():
            continue
        if all(u in members and layouts[u] == layout for u in node.users):
            members.add(node)
            layouts[node] = layout
            read_by |= dict.fromkeys(node.all_input_nodes, node)
            todo += node.all_input_nodes


def like(node: fx.Node, layout: Layout, heads: int, width: int) -> torch.Tensor:
    """A tensor like what a node yields, as the function takes it, with the sizes of the example."""
    value = fake(node)
    assert value is not None
    sizes: Any = value.shape
    sizes = [s if isinstance(s, int) else s.node.hint for s in sizes]
    return in_heads(torch.empty(sizes, dtype=value.dtype), layout, heads, width)
