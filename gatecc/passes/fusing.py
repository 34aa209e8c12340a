"""Fusing: the values that a fusion weighs, and the formulas by which it joins them."""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateSpec
from gatecc.ir.gates.option import call, expression
from gatecc.ir.gates.source import At, Cond, Source, Stage
from gatecc.ir.program import shape
from gatecc.ir.select import Selector
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import described_shape, on_example
from gatecc.passes.branch.body import Bank, Body
from gatecc.passes.operands import place, source, static_sizes

Operand = Source | Body


def operand_of(text: str) -> Operand:
    """What the text of a value means: a stage, ``at(SELECTOR)``, ``cond(INPUT)``, or the body of a branch.

    Raises ArgumentError.
    """
    name, _, _ = call(expression(text, "value"))
    found: Operand = Body.parse(text) if name in Body.choices else Source.parse(text)
    if isinstance(found, Bank) or not isinstance(found, (Stage, At, Cond, Body)):
        raise ArgumentError(
            "this is no value that can be fused",
            found=text,
            expected="a stage of the site, at(SELECTOR), cond(INPUT), or the body of a branch (no bank of experts)",
        )
    return found


def value_of(operand: Operand, selector: Selector, edit: Editor) -> Value:
    """The value of an operand at the editor's site; a body is inserted. Raises SiteRefusedError."""
    own = source(Stage("self").refs[0], selector, edit)
    if isinstance(operand, Source):
        return source(operand.refs[0], selector, edit)
    node = operand.build(edit.site, own, edit)
    if shape(node) != shape(own.node):  # a body may broadcast; what a gate reads has the value's own places
        node = edit.call(expanded, node, own.node, name="value")
    return Value(node, own.axes)


def check_alike(values: list[Value], like: Value, names: tuple[str, ...], site: Site) -> None:
    """Refuse values that do not count the same places and channels as ``like``, the value that they are fused into.

    Raises SiteRefusedError.
    """
    for name, value in zip(names, values, strict=True):
        if value.axes == like.axes and static_sizes(value) == static_sizes(like) and _sizes(value) == _sizes(like):
            continue
        raise SiteRefusedError(
            "the values of a fusion have other shapes",
            where=place(site),
            found=f"{name}: axes {value.axes}, ({described_shape(value.node)})",
            expected=f"axes {like.axes}, ({described_shape(like.node)}), those of {like.node.name}",
            do="bring it to the width of the site with side_head(SELECTOR), or take another value",
        )


def _sizes(value: Value) -> list[int | None]:
    """The sizes on the example: two streams of other lengths are told apart there."""
    return [on_example(size) for size in shape(value.node)]


def expanded(x: Tensor, like: Tensor) -> Tensor:
    """x, which broadcasts against ``like``, in its shape."""
    return x.expand_as(like)


# --- formulas ---------------------------------------------------------------------------------------------------------


def scaled_blend(one: Tensor, other: Tensor, gate: Tensor, scale: float) -> Tensor:
    """y <- scale * (g * one + (1 - g) * other)"""
    mixed = gate * one + (1 - gate) * other
    return mixed if scale == 1 else scale * mixed


def weighted_sum(scale: float, add: bool, first: Tensor, *pairs: Tensor) -> Tensor:
    """y <- scale * sum_i g_i * v_i, or with ``add`` first + that; pairs: g_0, v_0, g_1, v_1, ... In first's dtype."""
    total = pairs[0] * pairs[1]
    for gate, value in zip(pairs[2::2], pairs[3::2], strict=True):
        total = total + gate * value
    total = total if scale == 1 else scale * total
    total = first + total if add else total
    return total if total.dtype == first.dtype else total.to(first.dtype)


def weight_of(weights: Tensor, index: int, features: tuple[int, ...]) -> Tensor:
    """weights: (*positions, E) -> those of one value, with an axis of size 1 for each axis of its features."""
    one = weights.select(-1, index)
    for axis in features:
        one = one.unsqueeze(axis)
    return one


def sums_to_one(spec: GateSpec, count: int) -> bool:
    """Whether gates over so many values are shares: not negative, with the sum 1."""
    scores = torch.randn(8, count, generator=torch.Generator().manual_seed(0))
    gates: Tensor = spec.estimator.decide(scores, spec.activation)
    return bool((gates >= 0).all()) and bool(torch.allclose(gates.sum(-1), torch.ones(8), atol=1e-4))
