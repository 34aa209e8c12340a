"""skip-norm: a norm of a sum is one node of ONNX Runtime, which yields the sum as well.

``SkipSimplifiedLayerNormalization`` and ``SkipLayerNormalization``: the residual stream, what a branch adds to it, and
the bias of the branch's last product.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel
from gatecc.codegen.onnx.lower.rms_norm import is_rms_norm
from gatecc.codegen.onnx.lower.views import Views
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.sizes import node_shape, same

_RANKS = (2, 3)  # that the nodes take


@dataclass(frozen=True)
class _Norm:
    """``node = norm(x)`` with its weights."""

    node: fx.Node
    x: fx.Node
    scale: fx.Node
    shift: fx.Node | None
    epsilon: float


class SkipNorm(GraphLowering):
    """norm(a + b) -> Skip(Simplified)LayerNormalization, with the sum as its last output."""

    name = "skip-norm"
    after = ("rms-norm", "tables", "turned")
    targets = ("ort",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow, done = subject.flow(), set[fx.Node]()
        views = Views(flow)
        for norm in [n for node in subject.program.calls() if (n := _norm(node)) is not None]:
            total = views.idle(norm.x)
            if opname(total) != "add" or total in done or _is_of_positions(norm, total):
                continue
            if reason := _unfit(norm, total, flow):
                yield self.left(norm.node, "a norm of a sum", reason)
                continue
            done.add(total)
            op = self._write(subject, norm, total, views)
            yield self.done(norm.node, "a norm of a sum", op, "the shapes of both summands are equal")

    def _write(self, subject: Subject, norm: _Norm, total: fx.Node, views: Views) -> str:
        a, b, bias = _summands(total, views)
        writer = Writer(subject.program, total, self.name)
        rms = is_rms_norm(norm.node)
        if bias is not None:
            b = writer.called(b, aten.linear.default, *b.args[:2])
        op = "SkipSimplifiedLayerNormalization" if rms else "SkipLayerNormalization"
        inputs = [a, b, norm.scale, *([] if rms else [norm.shift]), bias]
        for held in (norm.scale, norm.shift):  # a weight may stand behind the sum
            if held is not None:
                _before(held, b if bias is not None else total)
        shape = tuple(total.meta["val"].shape)
        one = (*shape[:-1], 1)
        results = writer.several(
            f"com.microsoft::{op}",
            inputs,
            {"epsilon": norm.epsilon},
            [shape, one, one, shape],
            total.meta["val"].dtype,
        )
        norm.node.replace_all_uses_with(results[0])
        total.replace_all_uses_with(results[3], delete_user_cb=lambda user: user is not results[0].args[0])
        return op


def _norm(node: fx.Node) -> _Norm | None:
    given: Any = node.args
    if is_rms_norm(node):
        epsilon: Any = node.kwargs["attr_floats"]
        return _Norm(node, given[0][0], given[0][1], None, float(epsilon[0]))
    if opname(node) != "layer_norm":
        return None
    x, axes, scale, shift, epsilon = given[:5]
    if not isinstance(x, fx.Node) or not isinstance(scale, fx.Node) or len(tuple(axes)) != 1:
        return None
    return _Norm(node, x, scale, shift if isinstance(shift, fx.Node) else None, float(epsilon))


def _is_of_positions(norm: _Norm, total: fx.Node) -> bool:
    """Whether a summand is one for all samples. ``SkipLayerNormalization`` is seven times as slow as Add and
    LayerNormalization there (1,000 and 150 us for 512 x 384), into which ONNX Runtime fuses those of equal shapes."""
    shapes = [node_shape(n) or () for n in (*total.args[:2], total) if isinstance(n, fx.Node)]
    return not is_rms_norm(norm.node) and any(not _fits(shape, shapes[-1]) for shape in shapes[:-1])


def _unfit(norm: _Norm, total: fx.Node, flow: Flow) -> str:
    """Why the node would compute something else, or nothing would be gained."""
    a, b = total.args[:2]
    if not isinstance(a, fx.Node) or not isinstance(b, fx.Node) or total.kwargs.get("alpha", 1) != 1:
        return "a summand is a number"
    shapes = [node_shape(n) or () for n in (a, b, total)]
    if not any(_fits(one, shapes[2]) and _fits(other, shapes[2], several=True) for one, other in _orders(shapes)):
        return "the summands are of different shapes"
    if len(shapes[2]) not in _RANKS:
        return f"the node takes {' or '.join(map(str, _RANKS))} axes, not {len(shapes[2])}"
    if norm.scale in flow.data or norm.shift in flow.data or flow.writers.get(flow.base[total]):
        return "scale or sum change while the graph runs"
    return lacking_kernel(a, b, norm.scale, norm.node)


def _orders(shapes: Sequence[Any]) -> Sequence[tuple[Any, Any]]:
    return ((shapes[0], shapes[1]), (shapes[1], shapes[0]))


def _fits(shape: Sequence[Any], whole: Sequence[Any], *, several: bool = False) -> bool:
    """Whether a summand has the shape of the sum; with ``several`` one for all samples will do, (N, C) or (1, N, C)."""
    if several and len(whole) == 3 and len(shape) in (2, 3) and (len(shape) == 2 or shape[0] == 1):
        shape, whole = shape[-2:], whole[-2:]
    return len(shape) == len(whole) and all(map(same, shape, whole))


def _summands(total: fx.Node, views: Views) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """The stream, the branch, and the bias of the product that the branch ends in."""
    a, b = (n for n in total.args[:2] if isinstance(n, fx.Node))
    if not _fits(node_shape(a) or (), node_shape(total) or ()):
        a, b = b, a  # what is broadcast comes second
    if not _fits(node_shape(b) or (), node_shape(total) or ()):
        return a, b, None
    for stream, branch in ((a, b), (b, a)):
        product = views.idle(branch)
        alone = len(product.users) == 1 and all(len(n.users) == 1 for n in _path(branch, product))
        if opname(product) == "linear" and alone and isinstance(product.args[2:3] and product.args[2], fx.Node):
            bias: Any = product.args[2]
            return stream, product, bias
    return a, b, None


def _path(end: fx.Node, start: fx.Node) -> Sequence[fx.Node]:
    found: list[fx.Node] = []
    while end is not start:
        found.append(end)
        end = end.all_input_nodes[0]
    return found


def _before(held: fx.Node, place: fx.Node) -> None:
    """Move what depends on no data in front of a place: a weight that is read later, 1 + weight."""
    order = {n: i for i, n in enumerate(held.graph.nodes)}
    moved = [held]
    for node in moved:
        moved += [n for n in node.all_input_nodes if n not in moved]
    for node in sorted(moved, key=order.__getitem__):
        if order[node] > order[place]:
            place.prepend(node)


__all__ = ["SkipNorm"]
