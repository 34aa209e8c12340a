"""Views of weights: which rows of a parameter a product reads, through slices, transposes and the like."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import fx
from torch.fx.node import map_arg

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, VIEWS, opname
from gatecc.ir.sizes import node_shape, symbols

Orientation = Literal["out_in", "in_out", "conv"]


def parameter_behind(node: fx.Node) -> tuple[fx.Node, list[fx.Node]]:
    """The node behind views of a weight, and these views in order."""
    steps: list[fx.Node] = []
    while opname(node) in VIEWS | CASTS and isinstance(node.args[0], fx.Node):
        steps.append(node)
        node = node.args[0]
    return node, steps[::-1]


def rows_read(held: fx.Node, steps: list[fx.Node], out_axis: int) -> tuple[Orientation, tuple[int, int] | None] | None:
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


def bias_name(bias: object, rows: tuple[int, int] | None, flow: Flow) -> str | None:
    """The bias parameter, if the same rows of it are read as of the weight."""
    held, steps = parameter_behind(bias) if isinstance(bias, fx.Node) else (None, [])
    parameter = None if held is None else flow.program.weight(held)
    if held is None or not isinstance(parameter, torch.nn.Parameter) or parameter.ndim != 1:
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
