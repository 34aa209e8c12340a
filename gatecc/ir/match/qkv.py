"""The projections around attention: which weights make q, k and v, and which one reads the heads."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import fx, nn
from torch.fx.node import map_arg

from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, UnprovableError
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, RESHAPES, VIEWS, argument, operands, opname
from gatecc.ir.site import Weight
from gatecc.ir.sizes import Sizes, UnknownSizeError, node_shape, numel, same, symbols, value

Orientation = Literal["out_in", "in_out", "conv"]
_ELEMENTWISE = frozenset(
    "add sub mul div neg cat stack pow rsqrt sqrt mean sum norm linalg_vector_norm clamp_min clamp layer_norm rms_norm "
    "batch_norm group_norm sigmoid relu gelu silu view_as_complex view_as_real complex expand_as pad "
    "constant_pad_nd".split()
)
_BETWEEN = VIEWS | CASTS | DROPOUTS | _ELEMENTWISE
_AFTER = VIEWS | CASTS | DROPOUTS | frozenset("mul layer_norm rms_norm batch_norm sigmoid relu gelu silu div".split())
_CONVS = frozenset("conv1d conv2d conv3d convolution".split())
_BUDGET = 160


@dataclass(frozen=True, eq=False)
class Projection:
    """``node`` multiplies ``input`` with the parameter ``weight``, or with the output rows ``rows`` of it.

    ``channels`` is the axis of the node's output that the weight makes, ``features`` its size.
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
    if not isinstance(flow.program.parameter(held) if held.op == "get_attr" else None, nn.Parameter):
        return None
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
    fqn = flow.program.full_name(str(held.target))
    width = int(features) if not symbols(features) else 0
    return Projection(node, source, fqn, _bias_name(bias, rows, flow), orientation, channels, width, rows)


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
    if held is None or held.op != "get_attr":
        return None
    parameter = flow.program.parameter(held)
    if not isinstance(parameter, nn.Parameter) or parameter.ndim != 1:
        return None
    read = _through(steps, {held: torch.arange(len(parameter))})
    first, last = rows or (0, len(parameter))
    if read is None or not torch.equal(read, torch.arange(first, last)):
        return None
    return flow.program.full_name(str(held.target))


def _through(steps: list[fx.Node], env: dict[fx.Node, Any]) -> torch.Tensor | None:
    """The value of the last of some views, given that of the first one's input; None if they need more than that."""
    try:
        for step in steps:
            assert callable(step.target)
            env[step] = step.target(*map_arg(step.args, env.__getitem__), **step.kwargs)
    except (KeyError, RuntimeError, TypeError):
        return None
    return list(env.values())[-1]


@dataclass(frozen=True, eq=False)
class Origins:
    """``projection`` made the value, through the nodes ``between`` (in graph order, the value included)."""

    projection: Projection
    between: list[fx.Node]
    turn: fx.Node | None  # the first node of a rotary embedding

    @property
    def rotary(self) -> bool:
        """Whether the value is turned by its position."""
        return self.turn is not None

    def before_rotary(self) -> fx.Node | None:
        """The last value that all of the flow to the rotary embedding goes through."""
        nodes = [self.projection.node, *self.between]
        place = {node: i for i, node in enumerate(nodes)}
        reach, last = 0, None  # how far the readers of earlier values lie
        for i, node in enumerate(nodes):
            if node is self.turn:
                return last
            if reach <= i:
                last = node
            reach = max([reach, *(place[u] for u in node.users if u in place)])
        return None


def find_projection(node: fx.Node, flow: Flow) -> Origins | None:
    """The one projection that ``node`` comes from through views and elementwise operators; None if it is not one."""
    found: list[Projection] = []
    seen: set[fx.Node] = set()
    stack = [node]
    while stack and len(seen) < _BUDGET:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if opname(current) in CONTRACTIONS:
            made = projection(current, flow)
            found += [made] if made is not None else []
        elif opname(current) in _BETWEEN:
            stack.extend(current.all_input_nodes)
    if len(found) != 1 or len(seen) >= _BUDGET:
        return None
    between = _between(found[0].node, seen, flow)
    return Origins(found[0], between, _rotary(found[0].node, between))


def _between(start: fx.Node, seen: set[fx.Node], flow: Flow) -> list[fx.Node]:
    """The nodes of ``seen`` that ``start`` flows through."""
    reached = {start}
    order = sorted((n for n in seen if flow.order[n] > flow.order[start]), key=flow.order.__getitem__)
    result: list[fx.Node] = []
    for node in order:
        if any(n in reached for n in node.all_input_nodes):
            reached.add(node)
            result.append(node)
    return result


def _rotary(start: fx.Node, between: list[fx.Node]) -> fx.Node | None:
    """The first node that turns the value: as complex numbers, or by a table that varies with position and feature."""
    own = {start, *between}
    for current in between:
        if opname(current) == "view_as_complex":
            return current
        if opname(current) != "mul":
            continue
        others = [n for n in current.all_input_nodes if n not in own]
        shape = node_shape(others[0]) if others else None
        wide = shape is not None and sum(not same(s, 1) for s in shape) >= 2
        if wide and (others[0].op != "get_attr"):
            return current
    return None


# --- rows -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rows:
    """The output features of a projection that reach a value: ``count`` of them; ``range`` if they are consecutive."""

    count: int
    range: tuple[int, int] | None


def row_numbers(origins: Origins, evaluator: Evaluator, sizes: Sizes) -> tuple[fx.Node, torch.Tensor] | None:
    """The number of the projection's output feature that every element of a value comes from.

    They are sent through the views that split it; the node is the last of these views.
    """
    source = origins.projection
    chain = _view_chain(source.node, origins.between)
    last = chain[-1] if chain else source.node
    part = evaluator.slice(last, given=frozenset({source.node}))
    for values in (dict.fromkeys(sizes, 1), sizes):  # one token is enough, unless the views mix tokens
        try:
            numbers = evaluator.run(part, values, {source.node: _numbered(source, values)})
        except (UnprovableError, UnknownSizeError, RuntimeError):
            continue
        if numbers.numel():
            return last, numbers
    return None


def rows_of(numbers: torch.Tensor | None) -> Rows | None:
    """Which rows of a (fused) weight make the value."""
    if numbers is None:
        return None
    seen = numbers.unique()
    first, last = int(seen[0]), int(seen[-1]) + 1
    return Rows(len(seen), (first, last) if last - first == len(seen) else None)


def _numbered(source: Projection, sizes: Sizes) -> torch.Tensor:
    """A tensor of the projection's shape that holds the number of its output feature everywhere."""
    shape = [value(s, sizes) for s in source.node.meta["val"].shape]
    if source.orientation == "conv":
        return torch.arange(shape[1]).reshape(1, -1, *[1] * (len(shape) - 2)).expand(shape)
    tail = len(shape)
    while tail and torch.Size(shape[tail:]).numel() < source.features:
        tail -= 1
    return torch.arange(source.features).reshape(shape[tail:]).expand(shape)


def _view_chain(start: fx.Node, between: list[fx.Node]) -> list[fx.Node]:
    """The views after ``start`` up to where the paths to the value part or something else is done."""
    inside, chain, node = set(between), list[fx.Node](), start
    while True:
        users = [u for u in node.users if u in inside]
        if len(users) != 1 or opname(users[0]) not in VIEWS | CASTS or users[0].all_input_nodes[0] is not node:
            break
        node = users[0]
        chain.append(node)
    while chain and not isinstance(chain[-1].meta.get("val"), torch.Tensor):
        chain.pop()
    return chain


def weight_of(origins: Origins, rows: Rows | None) -> Weight:
    """The weight as a role of a site."""
    source = origins.projection
    part = None if rows is None or rows.count == source.features else rows.range
    if source.rows is not None:
        first, last = part or (0, source.features)
        part = source.rows[0] + first, source.rows[0] + last
    return Weight(source.weight, source.orientation, source.bias, part)


# --- after ------------------------------------------------------------------------------------------------------------


def find_output(heads: fx.Node, features: int, flow: Flow) -> Projection | None:
    """The projection that reads the heads, through views, gates and norms; it must read all ``features`` of them."""
    queue, seen = deque([heads]), {heads}
    while queue and len(seen) < 40:
        node = queue.popleft()
        for user in sorted(node.users, key=flow.order.__getitem__):
            if user in seen:
                continue
            seen.add(user)
            made = projection(user, flow) if opname(user) in CONTRACTIONS else None
            if made is not None and made.input is node and _reads(made, features):
                return made
            if opname(user) in _AFTER:
                queue.append(user)
    return None


def _reads(made: Projection, features: int) -> bool:
    shape = node_shape(made.input) or ()
    width = shape[1 if made.orientation == "conv" else -1] if shape else 0
    if opname(made.node) == "einsum":
        return True
    return not features or same(width, features)


def unflattened(node: fx.Node, forward: bool) -> fx.Node:
    """Step from a matrix (tokens, channels) over a reshape to the tensor with its own token axes."""
    if len(node_shape(node) or ()) != 2:
        return node
    if forward:
        users = [u for u in node.users if opname(u) in RESHAPES]
        return users[0] if len(users) == 1 and len(node.users) == 1 else node
    source = node.args[0] if opname(node) in RESHAPES else None
    return source if isinstance(source, fx.Node) else node
