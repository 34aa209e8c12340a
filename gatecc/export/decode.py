"""decode: the derived decoder's step as decode.onnx, one graph for prompts and steps, compared with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from gatecc.codegen.onnx.build import DATA, EXTERNAL, MODEL, Capture, Graph, Lower, build
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.lower import Target
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.runtime import Session, check
from gatecc.codegen.onnx.stream import save
from gatecc.decoder import Decoder, decoder
from gatecc.decoder.emit.closed import Closed
from gatecc.decoder.emit.names import input_names, layer_numbers, output_names, state_names
from gatecc.errors import ExportError
from gatecc.export.compare import Compared
from gatecc.export.lower import context_of, lower
from gatecc.export.steps import compare_steps, takes_padding, text
from gatecc.ops import registry

DECODE = "decode.onnx"
_REACH = 1 << 13  # positions that tables are made for if nobody says how many the model is for


@dataclass(frozen=True)
class Carried:
    """One state: ``output`` of a call is ``input`` of the next. ``shape``: of the input; ``grows``: the axis that is 0
    before the first token and gets longer with each, None if its size stays; ``fill``: its value before the first.
    ``shared``: input and output may be one buffer with room for more tokens."""

    input: str
    output: str
    kind: str
    layer: int | None
    shape: list[int | str]
    dtype: str
    grows: int | None
    fill: float
    shared: bool


@dataclass(frozen=True)
class Decode:
    """What decode.onnx is: tokens and states in, logits of all tokens and the next states out.

    ``mask``: whether it takes ``attention_mask`` (batch, all tokens so far and the new ones). ``padding``: where a
    prompt may be padded: "left" as in the model, "right" if that was found to give what each prompt gives by itself,
    "none" where a mask, if there is one, says how many tokens there are.
    ``values``: the inputs with a value per new token. ``singly``: behind the first call it takes several samples or
    several tokens, not both (GroupQueryAttention on a CPU). ``context_length``: the most tokens that it has positions
    for, None if there is no limit.
    """

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    states: tuple[Carried, ...]
    mask: bool
    padding: str
    values: tuple[str, ...]
    singly: bool
    context_length: int | None
    operators: dict[str, int]
    compared: tuple[Compared, ...]


def decode(
    model: nn.Module,
    inputs: tuple[Any, Any],
    folder: Path,
    whole: Graph,
    target: Target,
    opset: int,
    verify: bool,
) -> Decode:
    """Derive the decoder, and write its step to ``folder``, where ``whole`` lies as model.onnx: if that has a file of
    weights, both share it. Raises DecoderError if there is no step, ExportError."""
    made = decoder(model, inputs)
    reach = _reach(model, made)
    step = made.closed(reach, counted=target == "ort")
    if step.context:
        raise ExportError(
            "a decode graph of a model with an encoder cannot be written yet",
            where=type(model).__name__,
            found="inputs that are no tokens: " + ", ".join(n.name for n in made.plan.inputs.context),
            do="export with decode=False; gatecc.decoder runs it in torch",
        )
    lowered = partial(lower, target=target, opset=opset, context=reach)
    again = _again(step, lambda: made.closed(reach, counted=target == "ort"))
    graph = _graph(model, step, opset, registry.lowerings(target), lowered, whole.model.metadata_props, again)
    _write(graph, whole, folder)
    apart = graph.apart
    check(folder / DECODE, graph.places, apart=apart)
    compared: list[Compared] = []
    padded = False
    if verify:
        of = text(made, step, model, inputs)
        with closing(Session(folder / DECODE, graph.places, apart=apart)) as session:
            compared = compare_steps(made, step, of, session, singly=_singly(graph))
            padded = _singly(graph) and takes_padding(step, of, session)
    return _described(step, graph, compared, "right" if padded else "left" if _masks(step) else "none")


def _graph(
    model: nn.Module,
    step: Closed,
    opset: int,
    forms: Mapping[Any, Lowering],
    lowered: Lower,
    metadata: Mapping[str, str],
    capture: Capture,
) -> Graph:
    program = step.program
    results = program.graph_module(*program.example)
    where: Any = SimpleNamespace(m=model)
    call = Call(where, tuple(program.example), tuple(input_names(step)), tuple(output_names(step)), tuple(results))
    return build(call, opset, metadata, forms, capture, lower=lowered)


def _again(step: Closed, derive: Callable[[], Closed]) -> Capture:
    """What yields the program of a step, which whoever asks may edit: from the second time on it is derived again."""
    first = [step.program]
    return lambda axes: first.pop() if first else derive().program


def _write(graph: Graph, whole: Graph, folder: Path) -> None:
    if (folder / DATA).exists() or graph.nbytes > EXTERNAL:
        save({MODEL: whole.model, DECODE: graph.model}, folder, DATA)
    else:
        save({DECODE: graph.model}, folder)


def _singly(graph: Graph) -> bool:
    return "com.microsoft::GroupQueryAttention" in graph.operators


def _made_by_one_node(value: Any) -> bool:
    """Whether the node that appends to a state writes to the buffer that it is given."""
    node = value.producer()
    return node is not None and node.op_type == "GroupQueryAttention"


def _reach(model: nn.Module, made: Decoder) -> int:
    """How many tokens tables of positions are made for: as many as the model is."""
    return min(context_of(model) or _REACH, made.bound)


def _masks(step: Closed) -> bool:
    return step.mask is not None and not step.counted


def _described(step: Closed, graph: Graph, compared: list[Compared], padding: str) -> Decode:
    inputs = graph.shapes(graph.model.graph.inputs)
    shared = {v.name for v in graph.model.graph.outputs if _made_by_one_node(v)}
    states = [
        Carried(
            input=past,
            output=present,
            kind="values" if held.slot is None else held.slot.kind,
            layer=layer,
            shape=inputs[past],
            dtype=str(held.source.meta["val"].dtype).removeprefix("torch."),
            grows=held.grows,
            fill=0.0 if held.slot is None else held.slot.fill,
            shared=present in shared,
        )
        for held, layer, (past, present) in zip(step.held, layer_numbers(step), state_names(step), strict=True)
    ]
    return Decode(
        inputs=inputs,
        outputs=graph.shapes(graph.model.graph.outputs),
        states=tuple(states),
        mask=step.mask is not None,
        padding=padding,
        values=tuple(node.name for node in step.given if node is not step.mask),
        singly=_singly(graph),
        context_length=step.capacity,
        operators=graph.operators,
        compared=tuple(compared),
    )
