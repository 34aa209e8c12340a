"""Projections of attention: products of a value with a parameter, with rows of one, or with a computed matrix."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, VIEWS, argument, operands, opname
from gatecc.ir.sizes import node_shape, numel, symbols

Orientation = Literal["out_in", "in_out", "conv"]
_CONVS = frozenset("conv1d conv2d conv3d convolution".split())
_BUDGET = 160


@dataclass(frozen=True, eq=False)
class Projection:
    """``node`` multiplies ``input`` with the parameter ``weight``, or with the output rows ``rows`` of it.

    ``channels`` is the axis of the node's output that the weight makes, ``features`` its size. ``weight`` is "" where
    no one parameter is the matrix: it is computed (weight_norm), or the map is a sum of products (adapters).
    """

    node: fx.Node
    input: fx.Node
    weight: str
    bias: str | None
    orientation: Orientation
    channels: int
    features: int
    rows: tuple[int, int] | None = None


def projection(node: fx.Node, flow: Flow) -> Projection | None:
    """Read a node as a product with a parameter; None if it is not one."""
    name = opname(node)
    if name == "linear" or name in _CONVS:
        source, weight, bias = argument(node, 0, "input"), argument(node, 1, "weight"), argument(node, 2, "bias")
        orientation: Orientation = "conv" if name in _CONVS else "out_in"
        channels = 1 if name in _CONVS else -1
        return _make(node, source, weight, bias, orientation, channels, flow)
    if name == "addmm":
        return _make(node, node.args[1], node.args[2], node.args[0], "in_out", -1, flow)
    if name in ("mm", "matmul", "bmm"):
        return _make(node, node.args[0], node.args[1], None, "in_out", -1, flow)
    if name == "einsum" and len(operands(node)[1]) == 2:
        source, weight = operands(node)[1]
        return _make(node, source, weight, None, "in_out", -1, flow)
    return None


def _make(
    node: fx.Node, source: object, weight: object, bias: object, orientation: Orientation, channels: int, flow: Flow
) -> Projection | None:
    if not isinstance(source, fx.Node) or not isinstance(weight, fx.Node):
        return None
    held, steps = _parameter_behind(weight)
    fqn = flow.program.weight_name(held) if flow.program.is_parameter(held) else None
    if fqn is None:
        return _computed(node, source, weight, orientation, channels, flow)
    rows: tuple[int, int] | None = None
    if steps and orientation != "conv" and opname(node) != "einsum":
        read = _rows_read(held, steps, 0 if orientation == "out_in" else -1)
        if read is None:
            return None
        orientation, rows = read
    shape = node_shape(node)
    features = numel(shape[channels:] if channels < 0 else shape[1:2]) if shape else 0
    if opname(node) == "einsum":
        features = _einsum_features(node)
    width = int(features) if not symbols(features) else 0
    return Projection(node, source, fqn, _bias_name(bias, rows, flow), orientation, channels, width, rows)


def _computed(
    node: fx.Node, source: fx.Node, weight: fx.Node, orientation: Orientation, channels: int, flow: Flow
) -> Projection | None:
    """A product with a matrix or a kernel that is computed from parameters: weight_norm, spectral_norm, BOFT."""
    matrix = orientation == "conv" or len(node_shape(weight) or ()) == 2
    if source not in flow.data or weight in flow.data or not matrix:
        return None
    if opname(node) != "linear" and not _reads_parameter(weight, flow):
        return None  # a table of the model's: frequencies times positions
    width = (node_shape(node) or (0, 0))[channels]
    return Projection(node, source, "", None, orientation, channels, 0 if symbols(width) else int(width))


def _reads_parameter(node: fx.Node, flow: Flow) -> bool:
    seen, stack = {node}, [node]
    while stack and len(seen) < _BUDGET:
        current = stack.pop()
        if flow.program.is_parameter(current):
            return True
        new = [n for n in current.all_input_nodes if n not in seen]
        seen.update(new)
        stack.extend(new)
    return False


def _einsum_features(node: fx.Node) -> int:
    """The size of the axes that come from the weight."""
    equation = str(node.args[0]).replace(" ", "")
    source, _, rest = equation.partition(",")
    out = rest.partition("->")[2]
    sizes = [s for letter, s in zip(out, node_shape(node) or (), strict=False) if letter not in source]
    total = numel(sizes)
    return int(total) if total.is_Integer else 0


def _parameter_behind(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node behind views of a weight, and these views in order."""
    steps: list[fx.Node] = []
    while opname(node) in VIEWS | CASTS and isinstance(node.args[0], fx.Node):
        steps.append(node)
        node = node.args[0]
    return node, steps[::-1]


def _rows_read(held: fx.Node, steps: list[fx.Node], out_axis: int) -> tuple[Orientation, tuple[int, int] | None] | None:
    """Which axis of a parameter ends as the output axis of its views, and which part of it; None if that is unclear."""
    shape = node_shape(held) or ()
    if len(shape) != 2 or any(symbols(s) for s in shape):
        return None
    for axis in (0, 1):
        numbered = torch.arange(int(shape[axis])).unsqueeze(1 - axis).expand([int(s) for s in shape])
        read = _through(steps, {held: numbered})
        if read is None:
            return None
        numbers = read.movedim(out_axis, 0)
        if numbers.ndim == 2 and bool((numbers == numbers[:, :1]).all()) and len(numbers.unique()) == len(numbers):
            first, last = int(numbers[0, 0]), int(numbers[-1, 0]) + 1
            if last - first != len(numbers):
                return None
            return "out_in" if axis == 0 else "in_out", None if len(numbers) == shape[axis] else (first, last)
    return None


def _bias_name(bias: object, rows: tuple[int, int] | None, flow: Flow) -> str | None:
    """The bias parameter, if the same rows of it are read as of the weight."""
    held, steps = _parameter_behind(bias) if isinstance(bias, fx.Node) else (None, [])
    parameter = None if held is None else flow.program.weight(held)
    if held is None or not isinstance(parameter, nn.Parameter) or parameter.ndim != 1:
        return None
    read = _through(steps, {held: torch.arange(len(parameter))})
    first, last = rows or (0, len(parameter))
    if read is None or not torch.equal(read, torch.arange(first, last)):
        return None
    return flow.program.weight_name(held)


def _through(steps: list[fx.Node], env: dict[fx.Node, Any]) -> torch.Tensor | None:
    """The value of the last of some views, given that of the first one's input; None if they need more than that."""
    try:
        for step in steps:
            assert callable(step.target)
            env[step] = step.target(*map_arg(step.args, env.__getitem__), **step.kwargs)
    except (KeyError, RuntimeError, TypeError):
        return None
    return list(env.values())[-1]
