"""decode: the derived decoder's step as decode.onnx, one graph for prompts and steps, compared with torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from gatecc.codegen.onnx.buffers import count_by_mask, is_buffer
from gatecc.codegen.onnx.build import DATA, EXTERNAL, MODEL, Capture, Graph, Lower, build
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.lower import Target
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.passed import pass_on
from gatecc.codegen.onnx.runtime import Session, check
from gatecc.codegen.onnx.stream import save
from gatecc.decoder import Decoder, decoder
from gatecc.decoder.emit.closed import MASK, Closed
from gatecc.decoder.emit.names import TOKENS, input_names, layer_numbers, output_names, state_names
from gatecc.export.carried import Carried
from gatecc.export.compare import Compared
from gatecc.export.encoder import ENCODER, Encoding, described, encode, encode_in_torch, ends
from gatecc.export.genai import Genai, dummies, limits, unfit, write_config
from gatecc.export.locate import first_difference
from gatecc.export.lower import context_of, lower
from gatecc.export.padding import differs, takes_padding
from gatecc.export.steps import Filled, compare_steps, other_contexts, text
from gatecc.export.watched import Watched
from gatecc.ir.program import Program
from gatecc.ops import registry

DECODE = "decode.onnx"
_LOADED = 26  # the last opset that ONNX Runtime takes without a flag
_REACH = 1 << 13  # positions that tables are made for if nobody says how many the model is for


@dataclass(frozen=True)
class Decode:
    """What decode.onnx is: tokens and states in, logits of all tokens and the next states out.

    ``mask``: whether it takes ``attention_mask`` (batch, all tokens so far and the new ones). ``padding``: where a
    prompt may be padded: "left" as in the model, "right" if that was found to give what each prompt gives by itself,
    "none" where a mask, if there is one, says how many tokens there are. ``kept``: why attention reads the mask of a
    model that takes one rather than to count the tokens of each row by it, "" if it counts.
    ``values``: the inputs with a value per new token. ``singly``: behind the first call it takes several samples or
    several tokens, not both (GroupQueryAttention on a CPU). ``context_length``: the most tokens that it has positions
    for, None if there is no limit. ``genai``: how it does in onnxruntime-genai, for which genai_config.json is written.
    ``encoder``: what a text is decoded for, where the model has such inputs.
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
    genai: Genai
    encoder: Encoding | None = None
    kept: str = ""


def decode(
    model: nn.Module,
    inputs: tuple[Any, Any],
    folder: Path,
    whole: Graph,
    target: Target,
    opset: int,
    verify: bool,
    group_experts: bool = True,
) -> Decode:
    """Derive the decoder, and write its step to ``folder``, where ``whole`` lies as model.onnx: if that has a file of
    weights, both share it. Raises DecoderError if there is no step, ExportError."""
    made = decoder(model, inputs)
    wanted = _reach(model, made)
    reach = made.reach(wanted)
    counted = target == "ort"
    step, kept = _closed(made, reach, model, inputs, counted=counted, verify=verify)
    lowered = partial(lower, target=target, opset=opset, context=reach, group_experts=group_experts)
    written = partial(_graph, model, opset, registry.lowerings(target), lowered, whole.model.metadata_props)
    file = _file(made, step, reach, written, model, inputs, whole, folder, opset, verify=verify)
    if step.ragged and not step.counted and not file.padded:
        kept = "positions or states of decode.onnx count padding on the right"
        step = made.closed(reach)
        file = _file(made, step, reach, written, model, inputs, whole, folder, opset, verify=verify)
    graph, states = file.graph, file.states
    padding = "right" if file.padded else "left" if step.mask is not None and not step.counted else "none"
    takes, gives = graph.shapes(graph.model.graph.inputs), graph.shapes(graph.model.graph.outputs)
    context = min(reach, step.capacity or reach)
    notes = [] if file.refused else write_config(folder, DECODE, model, states, takes, gives, context)
    can = () if file.refused else (*limits(states, padding, context, kept), *notes)
    return Decode(
        inputs=takes,
        outputs=gives,
        states=(*states, *file.unread),
        mask=step.mask is not None,
        padding=padding,
        values=_values(step),
        singly=_singly(graph),
        context_length=step.capacity or (reach if reach < wanted else None),
        operators=graph.operators,
        compared=tuple(file.compared),
        genai=Genai(file.refused, "right" if file.padded else "none", can),
        encoder=described(step, file.first, graph),
        kept=kept,
    )


@dataclass(frozen=True)
class _File:
    """decode.onnx as it was written and compared, with encoder.onnx (``first``) if there is one."""

    graph: Graph
    first: Graph | None
    states: list[Carried]
    unread: list[Carried]
    refused: str
    compared: list[Compared]
    padded: bool


def _file(
    made: Decoder,
    step: Closed,
    reach: int,
    written: Callable[..., Graph],
    model: nn.Module,
    inputs: tuple[Any, Any],
    whole: Graph,
    folder: Path,
    opset: int,
    *,
    verify: bool,
) -> _File:
    again = _again(step.program, lambda: made.closed(reach, counted=step.ragged or step.counted).program)
    graph = written(step.program, again, input_names(step), output_names(step))
    if step.mask is not None:
        count_by_mask(graph.model.graph, MASK, TOKENS)
    states = _states(step, graph)
    refused = _unfit(step, graph, states, opset)
    unread = [] if refused else dummies(states)
    for state in unread:
        pass_on(graph.model, state.input, state.output, state.shape, state.dtype)
    graph = replace(graph, functions=whole.functions)
    encoder, first = made.encoder(), None
    if encoder is not None:
        first = written(encoder.program, _again(encoder.program, lambda: _encoder(made)), *ends(encoder))
        first = replace(first, functions=whole.functions)
    graphs = {DECODE: graph, **({} if first is None else {ENCODER: first})}
    _write(graphs, whole, folder)
    for name, each in graphs.items():
        check(folder / name, each.places, apart=each.apart)
    compared: list[Compared] = []
    padded = False
    if verify:
        with ExitStack() as opened:
            sessions = {name: Session(folder / name, each.places, apart=each.apart) for name, each in graphs.items()}
            for one in sessions.values():
                opened.callback(one.close)

            def locate(run: Callable[[Filled], object], limit: float) -> str:
                watched = Watched(sessions[DECODE], unread, graph, folder / DECODE, limit)
                run(watched)
                return watched.told

            def locate_first(names: Sequence[str], leaves: Sequence[Tensor]) -> str:
                return "" if first is None else first_difference(first, folder / ENCODER, names, leaves)

            of = text(made, step, model, inputs, encode(made, encoder, sessions.get(ENCODER), locate_first))
            session = Filled(sessions[DECODE], unread)
            compared = compare_steps(made, step, of, session, locate, singly=_singly(graph))
            for other in other_contexts(made, step, model, inputs, of):
                compared += compare_steps(made, step, other, session, locate, singly=_singly(graph), briefly=True)
            padded = takes_padding(step, of, session)
    return _File(graph, first, states, unread, refused, compared, padded)


def _closed(
    made: Decoder, reach: int, model: nn.Module, inputs: tuple[Any, Any], *, counted: bool, verify: bool
) -> tuple[Closed, str]:
    """The step, and why its attention keeps the mask that the model takes, "" if it counts the tokens of each row."""
    step = made.closed(reach, counted=counted)
    if not step.ragged or step.counted:
        return step, ""
    why = "nothing was compared"
    if verify:
        why = differs(step, made.plan, model, inputs, text(made, step, model, inputs, encode_in_torch(made)))
    return (made.closed(reach), why) if why else (step, "")


def _graph(
    model: nn.Module,
    opset: int,
    forms: Mapping[Any, Lowering],
    lowered: Lower,
    metadata: Mapping[str, str],
    program: Program,
    capture: Capture,
    inputs: Sequence[str],
    outputs: Sequence[str],
) -> Graph:
    results = program.graph_module(*program.example)
    where: Any = SimpleNamespace(m=model)
    call = Call(where, tuple(program.example), tuple(inputs), tuple(outputs), tuple(results))
    return build(call, opset, metadata, forms, capture, lower=lowered)


def _again(program: Program, derive: Callable[[], Program]) -> Capture:
    """What yields a program, which whoever asks may edit: from the second time on it is derived again."""
    first = [program]
    return lambda axes: first.pop() if first else derive()


def _encoder(made: Decoder) -> Program:
    encoder = made.encoder()
    assert encoder is not None
    return encoder.program


def _write(graphs: Mapping[str, Graph], whole: Graph, folder: Path) -> None:
    models = {name: graph.written for name, graph in graphs.items()}
    if (folder / DATA).exists() or any(graph.nbytes > EXTERNAL for graph in graphs.values()):
        save({MODEL: whole.written, **models}, folder, DATA)
    else:
        save(models, folder)


def _singly(graph: Graph) -> bool:
    return "com.microsoft::GroupQueryAttention" in graph.operators


def _reach(model: nn.Module, made: Decoder) -> int:
    """How many tokens tables of positions are made for: as many as the model is."""
    return min(context_of(model) or _REACH, made.bound)


def _unfit(step: Closed, graph: Graph, states: list[Carried], opset: int) -> str:
    """Why onnxruntime-genai does not run it, "" if it does."""
    if opset > _LOADED:
        return f"it loads no opset {opset}"
    if step.context:
        return "it gives a decoder nothing but tokens"
    mask = "int64" if step.mask is None else str(step.mask.meta["val"].dtype).removeprefix("torch.")
    return unfit(states, _values(step), graph.shapes(graph.model.graph.outputs)["logits"], mask)


def _values(step: Closed) -> tuple[str, ...]:
    """The inputs with a value per new token."""
    return tuple(node.name for node in step.given if node is not step.mask)


def _states(step: Closed, graph: Graph) -> list[Carried]:
    inputs = graph.shapes(graph.model.graph.inputs)
    shared = {v.name for v in graph.model.graph.outputs if is_buffer(v)}
    return [
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
            window=None if held.slot is None else held.slot.span.window,
        )
        for held, layer, (past, present) in zip(step.held, layer_numbers(step), state_names(step), strict=True)
    ]
