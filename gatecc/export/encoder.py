"""encoder: what the steps of decode.onnx read of an encoder, or of other inputs that are no tokens, as encoder.onnx."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.runtime import Session
from gatecc.decoder import Decoder
from gatecc.decoder.emit.closed import Closed
from gatecc.decoder.emit.encoder import Encoder
from gatecc.decoder.emit.names import context_names
from gatecc.decoder.plan import Plan
from gatecc.errors import ExportError
from gatecc.export.compare import TOLERANCE
from gatecc.export.locate import with_place
from gatecc.ir.sizes import expression, node_shape
from gatecc.scope.family import difference

ENCODER = "encoder.onnx"
Encode = Callable[[Mapping[fx.Node, Tensor]], dict[fx.Node, Tensor]]
Place = Callable[[Sequence[str], Sequence[Tensor]], str]


@dataclass(frozen=True)
class Encoding:
    """What a text is decoded for, given once: ``inputs`` of the model that are no tokens. ``outputs`` are those of
    encoder.onnx, which are inputs of decode.onnx by the same names; without any there is no such file. ``passed``:
    inputs of decode.onnx that are inputs of the model as they are."""

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    passed: dict[str, str]
    operators: dict[str, int] = field(default_factory=dict[str, int])


def ends(encoder: Encoder) -> tuple[list[str], list[str]]:
    """The names of the inputs and outputs of encoder.onnx."""
    names = context_names(encoder.plan)
    return [node.name for node in encoder.inputs], [names[node] for node in encoder.results]


def described(step: Closed, graph: Graph | None, decode: Graph) -> Encoding | None:
    """What the manifest says of it; None for a model without such inputs."""
    if not step.context:
        return None
    names = context_names(step.plan)
    shapes = decode.shapes(decode.model.graph.inputs)
    passed = {names[node]: node.name for node in step.context if node.op == "placeholder"}
    inputs = {given: shapes[name] for name, given in passed.items()}
    if graph is None:
        return Encoding(inputs, {}, passed)
    inputs |= graph.shapes(graph.model.graph.inputs)
    return Encoding(inputs, graph.shapes(graph.model.graph.outputs), passed, graph.operators)


def encode(made: Decoder, encoder: Encoder | None, session: Session | None, locate: Place) -> Encode:
    """What decode.onnx is given for these inputs of the model: what the file computes of them, and they themselves.

    Raises ExportError if that is not what torch computes. ``locate`` says of these inputs of the file which of its
    nodes differs first.
    """

    plan = made.plan

    def of(given: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        values = {node: given[node] for node in plan.inputs.context}
        found = {node: values[node] for node in plan.context if node in values}
        if encoder is None or session is None:
            return found
        names, outputs = ends(encoder)
        batch = next((x.shape[0] for n, x in values.items() if _samples(plan, n)), 1)
        expected = dict(zip(plan.context, made.context(batch, {n.name: x for n, x in values.items()}), strict=True))
        feeds = [values[node] for node in encoder.inputs]
        results = session.run(names, feeds)
        for name, node, x in zip(outputs, encoder.results, results, strict=True):
            error = _wrong(name, expected[node], x, values)
            if error is not None:
                raise with_place(error, lambda: locate(names, feeds))
            found[node] = x
        return found

    return of


def encode_in_torch(made: Decoder) -> Encode:
    """What the steps read of these inputs of the model, by torch."""
    plan = made.plan

    def of(given: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
        values = {node: given[node] for node in plan.inputs.context}
        batch = next((x.shape[0] for n, x in values.items() if _samples(plan, n)), 1)
        found = made.context(batch, {n.name: x for n, x in values.items()})
        return dict(zip(plan.context, found, strict=True))

    return of


def _samples(plan: Plan, node: fx.Node) -> bool:
    """Whether the first axis of an input counts samples."""
    shape = node_shape(node)
    return bool(shape) and expression(shape[0]) in plan.lengths.batch


def _wrong(name: str, expected: Tensor, found: Tensor, given: Mapping[fx.Node, Tensor]) -> ExportError | None:
    tolerance = TOLERANCE.get(expected.dtype, 0.0)
    same = expected.shape == found.shape and expected.dtype == found.dtype
    error = difference(expected, found) if same else float("inf")
    if error <= tolerance:
        return None
    return ExportError(
        f"{ENCODER} does not compute what the model does",
        where=f"{name} of " + ", ".join(f"{node.name} {tuple(x.shape)}" for node, x in given.items()),
        found=f"{tuple(found.shape)} {found.dtype}, difference {error:.3g} of the largest",
        expected=f"{tuple(expected.shape)} {expected.dtype}, at most {tolerance:.3g}",
        do="please report it with the model's code",
    )
