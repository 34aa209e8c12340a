"""Projection: one product of a value with a weight matrix or a convolution kernel, however the graph says it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.weight_views import Orientation, bias_name, parameter_behind, rows_read
from gatecc.ir.ops import CASTS, RESHAPES, SAME_SHAPE, TRANSPOSES, argument, opname
from gatecc.ir.program import Program, attribute, fake, origin, shape
from gatecc.ir.refusals import refuse
from gatecc.ir.site import Refusal, Weight
from gatecc.ir.sizes import node_shape, numel, same

LINEAR_OPS = {"linear": (0, 1, 2), "addmm": (1, 2, 0), "mm": (0, 1, None), "matmul": (0, 1, None)}  # data, weight, bias
CONV_OPS = frozenset("conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution".split())
_STACKED_OPS = frozenset("bmm baddbmm _grouped_mm grouped_mm_fallback einsum".split())


@dataclass(frozen=True, eq=False)
class Projection:
    """``out = in @ W (+ b)``. ``x`` and ``node`` are what the operator reads and yields; ``inp`` and ``out`` are
    the same values before flattening and after the shape is restored (addmm knows matrices only).

    ``weight`` is None where no one parameter is the matrix: it is computed, or several products are added (adapters).
    ``pointwise``: every position is projected alone (a Linear, or a 1x1 convolution without stride).
    ``depthwise``: every channel is filtered alone.
    """

    node: fx.Node
    x: fx.Node
    inp: fx.Node
    out: fx.Node
    weight: Weight | None
    in_width: int
    out_width: int
    conv: bool = False
    pointwise: bool = True
    depthwise: bool = False

    @property
    def channels(self) -> int:
        """The axis of features of what is read and yielded."""
        return 1 if self.conv else -1

    @property
    def owner(self) -> str:
        return origin(self.node).owner

    @property
    def weights(self) -> dict[str, Weight]:
        """The weight as the roles of a site."""
        return {} if self.weight is None else {"weight": self.weight}


def projection(program: Program, node: fx.Node, data: set[fx.Node]) -> Projection | Refusal | None:
    """What a node is: a projection, a refused look-alike, or neither. ``data``: the nodes that depend on inputs."""
    name = opname(node)
    if name in CONV_OPS:
        return _convolution(program, node)
    if name in LINEAR_OPS:
        return _linear(program, node, name, data)
    if name in _STACKED_OPS:
        return _einsum(program, node) if name == "einsum" else _stacked(program, node)
    return None


def behind(program: Program, node: Any) -> tuple[fx.Node, torch.Tensor, bool] | None:
    """The node that reads the weight behind an operand, the weight, and whether its last two axes are swapped."""
    swapped = False
    while isinstance(node, fx.Node) and node.op == "call_function":
        name = opname(node)
        if name in TRANSPOSES and swaps(node):
            swapped = not swapped
        elif name not in CASTS and name not in SAME_SHAPE:
            return None
        node = node.args[0]
    tensor = program.weight(node) if isinstance(node, fx.Node) else None
    return None if tensor is None else (node, tensor, swapped)


def swaps(node: fx.Node) -> bool:
    """Whether a transposition swaps the last two axes and leaves the others."""
    rank = len(shape(node))
    if opname(node) in ("t", "mT", "adjoint", "numpy_T"):
        return rank == 2 or opname(node) in ("mT", "adjoint")
    axes = node.args[1:] if not isinstance(node.args[1], (list, tuple)) else node.args[1]
    order = [axis % rank for axis in axes if isinstance(axis, int)]
    swap = [*range(rank - 2), rank - 1, rank - 2]
    return order == swap if opname(node) == "permute" else sorted(order) == [rank - 2, rank - 1]


def _linear(program: Program, node: fx.Node, name: str, data: set[fx.Node]) -> Projection | Refusal | None:
    data_at, weight_at, bias_at = LINEAR_OPS[name]
    x, operand = node.args[data_at], argument(node, weight_at, "weight")
    bias = None if bias_at is None else argument(node, bias_at, "bias")
    if not isinstance(x, fx.Node) or not isinstance(operand, fx.Node):
        return None
    found = behind(program, operand)
    if found is None or not isinstance(found[1], torch.nn.Parameter):
        return _no_matrix(program, node, x, operand, data)
    attr, tensor, swapped = found
    if tensor.dim() != 2:
        return refuse("GCC131", "linear", node, f"{program.weight_name(attr)} has {tensor.dim()} axes")
    out_in = swapped != (name == "linear")
    out_width, in_width = tensor.shape if out_in else reversed(tensor.shape)
    weight = Weight(fqn(program, attr, node), "out_in" if out_in else "in_out", _bias(program, bias, node))
    return Projection(node, x, *_restored(node, x), weight, in_width, out_width)


def computed(node: fx.Node, data: set[fx.Node]) -> Projection | None:
    """A product of a value with a matrix, or a kernel of one pixel, that is computed from parameters."""
    name = opname(node)
    conv = name in CONV_OPS
    if not conv and name not in LINEAR_OPS:
        return None
    x, operand = (node.args[at] for at in ((0, 1) if conv else LINEAR_OPS[name][:2]))
    if not isinstance(x, fx.Node) or not isinstance(operand, fx.Node) or x not in data or operand in data:
        return None
    channel, kernel = 1 if conv else -1, fake(operand)
    widths = shape(x)[channel], shape(node)[channel]
    if kernel is None or not all(isinstance(w, int) for w in widths) or (not conv and kernel.dim() != 2):
        return None
    alone = all(same(size, 1) for size in kernel.shape[2:]) and (not conv or _groups(node) == 1)
    pointwise = alone and (not conv or _all_one(argument(node, 3, "stride", 1)))
    ends = (x, node) if conv else _restored(node, x)
    return Projection(node, x, *ends, None, int(widths[0]), int(widths[1]), conv=conv, pointwise=pointwise)


def _no_matrix(program: Program, node: fx.Node, x: fx.Node, operand: fx.Node, data: set[fx.Node]) -> Refusal | None:
    """A product without a weight matrix on the right: of two values, mostly; else refused."""
    left = behind(program, x)
    if operand in data:
        on_left = left is not None and isinstance(left[1], torch.nn.Parameter)
        return refuse("GCC132", "linear", node, fqn(program, left[0])) if left and on_left else None
    if x not in data or not any(program.is_parameter(n) for n in _sources(operand)):
        return None
    return refuse("GCC130", "linear", node)


def _sources(node: fx.Node, limit: int = 64) -> set[fx.Node]:
    """A value and what it is computed from (at most about ``limit`` nodes)."""
    seen, stack = {node}, [node]
    while stack and len(seen) < limit:
        for source in stack.pop().all_input_nodes:
            if source not in seen:
                seen.add(source)
                stack.append(source)
    return seen


def _stacked(program: Program, node: fx.Node) -> Refusal | None:
    for operand in node.all_input_nodes:
        found = behind(program, operand)
        if found is not None and found[1].dim() > 2:
            return refuse("GCC131", "linear", node, f"{fqn(program, found[0])} has {found[1].dim()} axes")
    return None


def _einsum(program: Program, node: fx.Node) -> Projection | Refusal | None:
    """``...i,io->...o`` in any letters is a Linear; other equations with a weight are refused."""
    equation, operands = node.args[0], node.args[1]
    if not isinstance(equation, str) or not isinstance(operands, (list, tuple)) or len(operands) != 2:
        return None
    x, operand = operands
    found = behind(program, operand)
    if not isinstance(x, fx.Node) or found is None or not isinstance(found[1], torch.nn.Parameter):
        return None
    attr, tensor, swapped = found
    left, _, result = equation.replace(" ", "").partition("->")
    data_axes, _, weight_axes = left.partition(",")
    if len(weight_axes) != 2 or "." in weight_axes:
        return refuse("GCC131", "linear", node, f"einsum {equation!r}")
    inner = data_axes[-1:]
    outer = weight_axes.replace(inner, "")
    if inner not in weight_axes or result != data_axes[:-1] + outer:
        return refuse("GCC132", "linear", node, f"einsum {equation!r}")
    out_in = (weight_axes == outer + inner) != swapped
    out_width, in_width = tensor.shape if out_in else reversed(tensor.shape)
    weight = Weight(fqn(program, attr, node), "out_in" if out_in else "in_out")
    return Projection(node, x, x, node, weight, in_width, out_width)


def _convolution(program: Program, node: fx.Node) -> Projection | Refusal | None:
    x, operand = node.args[0], argument(node, 1, "weight")
    if not isinstance(x, fx.Node) or not isinstance(operand, fx.Node):
        return None
    found = behind(program, operand)
    if found is None or not isinstance(found[1], torch.nn.Parameter):
        return refuse("GCC130", "conv", node)
    attr, tensor, _ = found
    transposed = opname(node).startswith("conv_transpose") or bool(argument(node, 6, "") is True)
    groups = _groups(node)
    first, second = int(tensor.shape[0]), int(tensor.shape[1])
    in_width, out_width = (first, second * groups) if transposed else (second * groups, first)
    alone = all(size == 1 for size in tensor.shape[2:])
    weight = Weight(fqn(program, attr, node), "conv", _bias(program, argument(node, 2, "bias"), node))
    return Projection(
        node,
        x,
        x,
        node,
        weight,
        in_width,
        out_width,
        conv=True,
        pointwise=alone and groups == 1 and not transposed and _all_one(argument(node, 3, "stride", 1)),
        depthwise=groups > 1 and groups == in_width,
    )


def _groups(node: fx.Node) -> int:
    name = opname(node)
    position = 8 if name == "convolution" else 6
    groups = argument(node, position, "groups", 1)
    return groups if isinstance(groups, int) else 1


def _all_one(value: Any) -> bool:
    return all(v == 1 for v in value) if isinstance(value, (list, tuple)) else value == 1


def fqn(program: Program, attr: fx.Node, user: fx.Node | None = None) -> str:
    """The name of a parameter; of a tied one, that which the module of ``user`` knows it by."""
    name = str(program.weight_name(attr))
    if user is None or name.startswith(origin(user).owner + "."):
        return name
    own = ".".join(part for part in (origin(user).owner, name.rpartition(".")[2]) if part)
    try:
        tied = program.inside(own) and attribute(program.module, program.relative_name(own)) is program.weight(attr)
    except AttributeError:
        return name
    return own if tied else name


def _bias(program: Program, bias: Any, user: fx.Node) -> str | None:
    found = behind(program, bias)
    return None if found is None else fqn(program, found[0], user)


def _restored(node: fx.Node, x: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The values around ``node`` with all their axes, if x was flattened to a matrix for it and the result restored."""
    before = x.args[0] if opname(x) in RESHAPES and x.args else None
    users = list(node.users)
    if not isinstance(before, fx.Node) or fake(before) is None or len(users) != 1 or opname(users[0]) not in RESHAPES:
        return x, node
    full, back = shape(before), shape(users[0])
    leads = len(full) == len(back) > len(shape(x)) and all(map(same, full[:-1], back[:-1]))
    return (before, users[0]) if leads and same(full[-1], shape(x)[-1]) else (x, node)


# --- products of attention --------------------------------------------------------------------------------------------


def weighted(node: fx.Node, flow: Flow) -> Projection | None:
    """Any product of a value with weights: besides what `projection` takes, with rows of a matrix, with a stack of
    matrices, with an einsum that gives several axes, or with a matrix that is computed from parameters.
    """
    program, name = flow.program, opname(node)
    found = projection(program, node, flow.data)
    if isinstance(found, Projection) or name.startswith("conv_transpose"):
        return found if isinstance(found, Projection) and not name.startswith("conv_transpose") else None
    given = _operands(node)
    if given is None:
        return None
    x, operand, bias = given
    held, steps = parameter_behind(operand)
    if not program.is_parameter(held):
        return _computed_matrix(node, x, operand, flow)
    orientation: Orientation = "conv" if name in CONV_OPS else "out_in" if name == "linear" else "in_out"
    rows: tuple[int, int] | None = None
    if steps and orientation != "conv" and name != "einsum":
        read = rows_read(held, steps, 0 if orientation == "out_in" else -1)
        if read is None:
            return None
        orientation, rows = read
    conv = orientation == "conv"
    weight = Weight(fqn(program, held, node), orientation, bias_name(bias, rows, flow), rows)
    widths = _width(x, conv), _einsum_features(node) if name == "einsum" else _width(node, conv)
    return Projection(node, x, x, node, weight, *widths, conv=conv)


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node, Any] | None:
    """What a product reads: the value, the weights and the bias."""
    name = opname(node)
    if name == "einsum":
        terms = node.args[1]
        given = (*terms, None) if isinstance(terms, list | tuple) and len(terms) == 2 else (None, None, None)
    elif name in CONV_OPS:
        given = node.args[0], argument(node, 1, "weight"), argument(node, 2, "bias")
    elif name in LINEAR_OPS or name == "bmm":
        at, weight, bias = LINEAR_OPS.get(name, (0, 1, None))
        given = node.args[at], argument(node, weight, "weight"), None if bias is None else argument(node, bias, "bias")
    else:
        return None
    x, operand, added = given
    return (x, operand, added) if isinstance(x, fx.Node) and isinstance(operand, fx.Node) else None


def _computed_matrix(node: fx.Node, x: fx.Node, operand: fx.Node, flow: Flow) -> Projection | None:
    """A product with a matrix or a kernel that is computed from parameters: weight_norm, spectral_norm, BOFT."""
    conv = opname(node) in CONV_OPS
    matrix = conv or len(shape(operand) if fake(operand) is not None else ()) == 2
    if x not in flow.data or operand in flow.data or not matrix:
        return None
    if opname(node) != "linear" and not any(flow.program.is_parameter(n) for n in _sources(operand, 160)):
        return None  # a table of the model's: frequencies times positions
    return Projection(node, x, x, node, None, _width(x, conv), _width(node, conv), conv=conv)


def _width(node: fx.Node, conv: bool) -> int:
    """The size of the axis of features, 0 if it is not fixed."""
    sizes = node_shape(node)
    size = sizes[1 if conv else -1] if sizes else 0
    return size if isinstance(size, int) else 0


def _einsum_features(node: fx.Node) -> int:
    """The size of the axes that come from the weight."""
    equation = str(node.args[0]).replace(" ", "")
    source, _, rest = equation.partition(",")
    out = rest.partition("->")[2]
    sizes = [s for letter, s in zip(out, node_shape(node) or (), strict=False) if letter not in source]
    total = numel(sizes)
    return int(total) if total.is_Integer else 0
