"""Streams: what attention reads and yields around its projections, with axes that are named by what they count."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator
from gatecc.ir.match.attention.origins import Origins
from gatecc.ir.match.attention.output import unflattened
from gatecc.ir.match.attention.rows import row_numbers
from gatecc.ir.match.projection import Projection
from gatecc.ir.ops import opname
from gatecc.ir.program import META, Origin, origin
from gatecc.ir.site import Value
from gatecc.ir.sizes import Sizes, node_shape, numel, on_example, same


@dataclass(frozen=True, eq=False)
class Operand:
    """q, k or v after constant factors, transposes, merged heads and repeated heads are taken off."""

    node: fx.Node
    axes: str
    factor: float | None
    origins: Origins | None


def streams(
    operands: tuple[Operand, Operand, Operand],
    output: Projection | None,
    heads: Value,
    counts: tuple[int, int],
    core: fx.Node,
    flow: Flow,
) -> dict[str, Value]:
    """``hidden``, ``hidden_kv`` and ``out``, as far as they have the places of queries, keys and outputs.

    ``counts`` are the heads of queries and of keys.
    """
    q, k, v = operands
    result: dict[str, Value] = {}
    keys = k.origins or v.origins
    if q.origins is not None:
        result["hidden"] = _read(q.origins, q, "n", counts[0], core, flow)
    if keys is not None and (q.origins is None or _inputs(keys) != _inputs(q.origins)):
        result["hidden_kv"] = _read(keys, k, "m", counts[1], core, flow)
    if output is not None:
        out = named(unflattened(output.node, forward=True), q, "n")
        result["out"] = out if _same_places(out, heads, counts[0]) else Value(out.node, "")
    return {name: value for name, value in result.items() if value.axes}


def _inputs(origins: Origins) -> list[fx.Node]:
    return [projection.x for projection in origins.projections]


def _read(origins: Origins, operand: Operand, token: str, heads: int, core: fx.Node, flow: Flow) -> Value:
    """What the projections of a value read; without axes where it has other places than the value."""
    parts = [unflattened(node, forward=False) for node in _inputs(origins)]
    value = named(parts[0], operand, token)
    if len(parts) > 1:
        joined = _joined(parts, core, flow) if _fit(parts) else None
        value = named(joined, operand, token) if joined is not None else Value(parts[0], "")
    return value if _same_places(value, Value(operand.node, operand.axes), heads) else Value(value.node, "")


def _fit(parts: list[fx.Node]) -> bool:
    """Whether streams (b, n, c) can be joined: they differ in their numbers of tokens alone."""
    shapes = [list(node_shape(part) or ()) for part in parts]
    return all(len(s) == 3 and same(s[0], shapes[0][0]) and same(s[2], shapes[0][2]) for s in shapes)


def _joined(parts: list[fx.Node], core: fx.Node, flow: Flow) -> fx.Node:
    """Streams one after the other along their tokens, as attention joins their queries.

    The node is new in the graph; where no rewrite reads it, it goes with the other dead ones.
    """
    last = max(parts)
    graph = last.graph
    with graph.inserting_after(last):
        node = graph.call_function(torch.ops.aten.cat.default, (parts, 1))
    node.meta = {"val": torch.cat([part.meta["val"] for part in parts], 1)}
    node.meta[META] = Origin(origin(core).owner, origin(core).call, origin(core).line)
    if "nn_module_stack" in core.meta:
        node.meta["nn_module_stack"] = core.meta["nn_module_stack"]
    flow.add(node)
    return node


def _same_places(value: Value, other: Value, heads: int) -> bool:
    """Whether two values have as many places, tokens times samples, on the example; True where that is not known."""
    mine, theirs = _places(value, heads), _places(other, heads)
    return mine is None or theirs is None or mine == theirs


def _places(value: Value, heads: int) -> int | None:
    shape = node_shape(value.node)
    if shape is None or len(shape) != len(value.axes) or ("g" in value.axes and not heads):
        return None
    sizes = {letter: on_example(size) for letter, size in zip(value.axes, shape, strict=True)}
    if None in sizes.values():
        return None
    total = prod(int(size or 0) for letter, size in sizes.items() if letter not in "hrdc")
    return total // heads if "g" in sizes else total


def before_rotary(operand: Operand) -> Value | None:
    """The operand before it was turned by its positions; None if its axes are unclear there."""
    if operand.origins is None or not operand.origins.rotary:
        return Value(operand.node, operand.axes)
    node = operand.origins.before_rotary()
    shape, sizes = node_shape(node) if node is not None else None, node_shape(operand.node) or ()
    if node is None or shape is None or len(shape) != 4 or operand.axes not in ("bhnd", "bhmd"):
        return None
    by_letter, (b, h, n, d) = dict(zip(operand.axes, sizes, strict=True)), operand.axes
    orders = (operand.axes, b + n + h + d)
    fitting = [order for order in orders if all(map(same, shape, (by_letter[a] for a in order)))]
    return Value(node, fitting[0]) if len(fitting) == 1 else None


def made_alone(operand: Operand, heads: int, evaluator: Evaluator, sizes: Sizes) -> bool:
    """Whether a projection of (b, n, c) yields these heads and nothing else, one after the other."""
    origins, letters = operand.origins, dict(zip(operand.axes, node_shape(operand.node) or (), strict=False))
    if origins is None or origins.others or not heads or not origins.projection.pointwise or origins.projection.conv:
        return False
    out, width, tokens = node_shape(origins.projection.out) or (), letters.get("d"), letters.get("n", letters.get("m"))
    if len(out) != 3 or width is None or tokens is None or not same(out[1], tokens):
        return False
    if not same(out[2], numel([heads, width])):
        return False
    numbers = row_numbers(origins, evaluator, sizes)
    count = origins.projection.out_width
    return numbers is not None and bool(torch.equal(numbers[1].reshape(-1)[:count], torch.arange(count)))


def named(node: fx.Node, operand: Operand, token: str) -> Value:
    """A tensor before or after attention, its axes named by rank and by the sizes of the operand."""
    shape = node_shape(node) or ()
    sizes = dict(zip(operand.axes, node_shape(operand.node) or (), strict=False))
    if len(shape) == 4:
        return Value(node, "bcyx" if opname(node).startswith("conv") or _feeds_conv(node) else "byxc")
    if len(shape) == 3:
        if _feeds_conv(node):
            return Value(node, "bcn")
        first = any(letter in sizes and same(shape[at], sizes[letter]) for at, letter in ((0, token), (1, "b")))
        usual = any(letter in sizes and same(shape[at], sizes[letter]) for at, letter in ((1, token), (0, "b")))
        if "w" in sizes and token in sizes and not same(shape[1], sizes[token]):
            return Value(node, "")  # the attention module cuts the tokens into windows itself
        return Value(node, "nbc" if first and not usual else "bnc")
    return Value(
        node,
        "nc"
        if len(shape) == 2 and token in sizes and same(shape[0], sizes[token])
        else "bc"
        if len(shape) == 2
        else "",
    )


def _feeds_conv(node: fx.Node) -> bool:
    return opname(node).startswith("conv") or any(
        opname(u).startswith("conv") and u.args[0] is node for u in node.users
    )
