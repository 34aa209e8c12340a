"""Operands of the fused operator: queries, keys and values behind what a spelling does to them before its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.attention.expand import is_identity, unexpanded
from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import CASTS, RESHAPES, TRANSPOSES, opname
from gatecc.ir.program import fake
from gatecc.ir.sizes import expression, node_shape
from gatecc.passes.lower.attention.atoms import Atom, Group, Layout, whole
from gatecc.passes.lower.attention.numbers import factor as factor_of
from gatecc.passes.lower.attention.softmax_reading import Reading, UnreadableError


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor of the graph, the axes of which it has, and the number by which it was multiplied since."""

    node: fx.Node
    layout: Layout
    factor: float = 1.0


@dataclass(frozen=True, eq=False)
class Operands:
    """``batch``: the atoms of everything but tokens and features, in order; ``core``: the layout of the result."""

    q: Operand
    k: Operand
    v: Operand
    batch: Group
    queries: Group
    keys: Group
    width: Group
    v_width: Group
    core: Layout


def operands(reading: Reading, flow: Flow) -> Operands:
    """What the fused operator is to be given. Raises UnreadableError."""
    product, weighted_sum = reading.parts.product, reading.parts.weighted_sum
    assert weighted_sum is not None
    letters = dict(reading.letters)
    contracted = product.contracted
    if len(contracted) != 1:
        raise UnreadableError("queries and keys meet in several axes")
    left = dict(zip(product.left_axes, node_shape(product.left) or (), strict=True))
    letters[contracted] = whole(left[contracted])
    own = [a for a in product.left_axes if a not in product.right_axes]
    other = [a for a in product.right_axes if a not in product.left_axes]
    keys_right = reading.parts.keys in other
    queries = next((a for a in reversed(own if keys_right else other) if a in product.axes), "")
    if not queries or not letters[queries]:
        raise UnreadableError("there is a single query, which the fused operator is no faster at")
    sides = [(product.left, product.left_axes), (product.right, product.right_axes)]
    q, k = sides if keys_right else reversed(sides)
    v_letters, core, v_width = _values(reading)
    keys = reading.parts.keys
    batch = tuple(atom for a in product.axes if a not in (queries, keys) for atom in letters[a])
    peeled = (
        _peeled(*q, letters, reading, flow, scales=True),
        _peeled(*k, letters, reading, flow, scales=True, batch=batch),
        _peeled(weighted_sum.values, weighted_sum.values_axes, v_letters, reading, flow, batch=batch),
    )
    now = reading.cuts.layout
    q, k, v = (Operand(p.node, now(p.layout), p.factor) for p in peeled)
    ends = letters[queries], letters[keys], letters[contracted], v_width
    if any(len(reading.cuts.now(end)) != 1 for end in ends):
        raise UnreadableError("tokens or features are cut, or there is one only")
    return Operands(q, k, v, reading.cuts.now(batch), *ends, core=now(core))


def _values(reading: Reading) -> tuple[dict[str, Group], Layout, Group]:
    """The letters of the product with the values, the layout of its result, and the features of the values."""
    weighted_sum = reading.parts.weighted_sum
    assert weighted_sum is not None
    letters = dict(zip(weighted_sum.weights_axes, reading.weights, strict=True))
    if letters[weighted_sum.keys] != reading.keys:
        raise UnreadableError("the values are summed over another axis than the keys")
    shape = dict(zip(weighted_sum.values_axes, node_shape(weighted_sum.values) or (), strict=True))
    own = [a for a in weighted_sum.values_axes if a not in letters]
    if len(own) != 1 or weighted_sum.source.addend is not None or weighted_sum.source.alpha != 1:
        raise UnreadableError("the values have more axes than tokens, heads and features")
    letters[own[0]] = whole(shape[own[0]])
    return letters, tuple(letters[a] for a in weighted_sum.source.axes), letters[own[0]]


def _peeled(
    node: fx.Node,
    axes: str,
    letters: dict[str, Group],
    reading: Reading,
    flow: Flow,
    scales: bool = False,
    batch: Group = (),
) -> Operand:
    """Take off transposes, constant factors, casts to more precision, merged heads and repeated heads."""
    factor, layout = 1.0, _layout(node, tuple(letters[a] for a in axes))
    for _ in range(16):
        source = node.args[0] if node.args else None
        if not isinstance(source, fx.Node) or node.op != "call_function" or flow.writers.get(flow.base[node]):
            break
        name, number = opname(node), factor_of(node, source, flow)
        if name in TRANSPOSES and (order := permutation(node, len(layout))) is not None:
            layout = tuple(layout[order.index(i)] for i in range(len(order)))
        elif scales and name in ("mul", "div") and number is not None and number > 0 and _same(node, source):
            factor *= number
        elif name in CASTS and _only_precision(node, source):
            pass
        elif name in RESHAPES and (apart := _apart(source, layout, reading)) is not None:
            layout = apart
        elif batch and (fewer := _unrepeated(node, layout, reading, batch)) is not None:
            source, layout = fewer
        elif not is_identity(node):
            break
        node = source
    return Operand(node, layout, factor)


def _layout(node: fx.Node, groups: Layout) -> Layout:
    """Axes of size 1 have no atoms: they are broadcast."""
    shape = node_shape(node) or ()
    return tuple(() if isinstance(s, int) and s == 1 else g for s, g in zip(shape, groups, strict=True))


def _same(node: fx.Node, source: fx.Node) -> bool:
    one, other = fake(node), fake(source)
    return one is not None and other is not None and one.dtype == other.dtype and _shape(node) == _shape(source)


def _shape(node: fx.Node) -> list[str]:
    return [str(expression(size)) for size in node_shape(node) or ()]


def _only_precision(node: fx.Node, source: fx.Node) -> bool:
    """Whether a cast is to more precision on the same device: the fused operator computes with that anyway."""
    one, other = fake(node), fake(source)
    if one is None or other is None or not (one.is_floating_point() and other.is_floating_point()):
        return False
    return one.device == other.device and other.dtype.itemsize <= one.dtype.itemsize


def _apart(source: fx.Node, layout: Layout, reading: Reading) -> Layout | None:
    """Heads that were merged with the batch, where the scores take the two apart as well."""
    shape, layout = node_shape(source) or (), reading.cuts.layout(layout)
    groups = [g for group in layout for g in ([(a,) for a in group] or [()])]
    if len(groups) != len(shape) or len(groups) == len(layout):
        return None
    fits = all(expression(s) == (g[0].size if g else 1) for s, g in zip(shape, groups, strict=True))
    return tuple(groups) if fits else None


def _unrepeated(node: fx.Node, layout: Layout, reading: Reading, batch: Group) -> tuple[fx.Node, Layout] | None:
    """Key heads before they are repeated for the queries that share them: the atom of heads is cut in two."""
    layout = reading.cuts.layout(layout)
    for at, group in enumerate(layout):
        if not group or group[-1] not in reading.cuts.now(batch):
            continue
        source = unexpanded(node, "".join("h" if i == at else "b" for i in range(len(layout))))
        if source is None:
            continue
        fewer = expression((node_shape(source) or ())[at])
        kept = () if fewer == 1 else _outer(group, fewer, reading)
        return None if kept is None else (source, (*layout[:at], kept, *layout[at + 1 :]))
    return None


def _outer(group: Group, fewer: Any, reading: Reading) -> Group | None:
    """The first atoms of an axis, of so many heads."""
    if group[0].size == fewer and len(group) > 1:
        return group[:1]
    if len(group) != 1:
        return None
    outer: Atom | None = reading.cuts.cut(group[0], fewer)
    return None if outer is None else (outer,)
