"""export: a model as a folder with model.onnx, compared with torch before anything is written."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import nn

from gatecc.capture.adapters import adapted, experts_open
from gatecc.capture.budget import budget
from gatecc.capture.shield import random_states_kept, shielded
from gatecc.capture.signature import OpaqueArgumentError, map_tensors, split_inputs
from gatecc.codegen.onnx.build import (
    MODEL,
    Axes,
    Capture,
    Freedom,
    Graph,
    build,
    captured,
    free_axes,
    write,
)
from gatecc.codegen.onnx.leaves import Call, flat_call
from gatecc.codegen.onnx.lower import Target
from gatecc.codegen.onnx.opset import RAISED, WRITTEN
from gatecc.codegen.onnx.packages import EXPORT, RUNTIME, need, need_opset
from gatecc.codegen.onnx.place import blame
from gatecc.codegen.onnx.runtime import check, check_dtypes
from gatecc.engine.analyse import Inputs, check_model, evaluation
from gatecc.engine.whole import reads_masks, whole_program
from gatecc.errors import ArgumentError, CaptureError, ExampleInputsError, ExportError, GateccError
from gatecc.export.beside import write_beside
from gatecc.export.compare import Compared, Outcome, compare, located
from gatecc.export.decode import Decode
from gatecc.export.decode import decode as decode_step
from gatecc.export.files import MANIFEST, Exported, describe, made_by, metadata, move, parent, write_manifest
from gatecc.export.genai import no_buffers
from gatecc.export.lower import context_of, lower
from gatecc.export.page import write_report
from gatecc.export.progress import stage
from gatecc.export.quantize import Quantize, Quantized, quantized, resolve
from gatecc.export.settled import settled
from gatecc.ir.program import Program
from gatecc.ops import registry
from gatecc.passes.ensemble.ensemble import in_branches
from gatecc.scope.printed_rows import bodies_in_branches
from gatecc.scope.state import scopes
from gatecc.scope.transformers_loops import transformers_loops

__all__ = ["MANIFEST", "Compared", "Exported", "export"]

TARGETS: tuple[str, ...] = get_args(Target)
OPSETS = range(18, 26)  # torch.onnx writes invalid files for 26
TIMEOUT = 600.0  # seconds of CPU time
FREEDOMS = tuple(Freedom)
_GIVEN_UP = {Freedom.NO_IMAGE_SIDES: "height and width of images stay", Freedom.BATCH: "all sizes but the batch stay"}
_HOPELESS = ("DispatchError", "data-dependent", "DataDependent", "Unbacked")  # no size has anything to do with it
_UNFORESEEN = "gatecc did not foresee this: please report it with the model's code; verify=False may still write it"
_SLOW_EXPERTS = ("batched_mm",)  # 8 to 20 times as slow from 16 tokens on; "grouped_mm" and our operator are alike
_IMAGE_SIDES = 20.0  # of these, until height and width of images are given up: windowed models take many minutes


@shielded
def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    target: Target = "ort",
    opset: int | None = None,
    decode: bool = False,
    verify: bool = True,
    timeout: float | None = TIMEOUT,
    group_experts: bool = True,
    external_data: bool = False,
    quantize: str | Quantize | None = None,
    evaluation_inputs: Iterable[Inputs] | None = None,
    tokenizer: Any = None,
    functions: bool = False,
) -> Exported:
    """Write ``model.onnx`` and a manifest ``gatecc.json`` to ``folder``; batch, length and the like stay free.

    The graph is that of the model in eval mode without gradients and caches. It passes ONNX's checker and is compared
    with torch in ONNX Runtime at batch 1 and 3 and two lengths; if that fails, nothing is written. What differs by more
    than a tolerance is held against the model in float64: ONNX Runtime may be about as far from it as torch is.
    Without ONNX Runtime, the reference evaluator of ONNX computes one small size, and a note says so.
    ``verify=False`` leaves the comparison out. Weights beyond 1.5 GiB, or any
    with ``external_data=True``, go to ``model.onnx.data``. No second copy of the weights is made here: a process of its
    own checks and runs large models.

    A size is free if the model runs at another one and the graph is right there. Where height and width of images, or
    lengths, cannot be free (or take too long to be), they are those of the example, and a note says so.

    ``target``: "ort" writes operators of ONNX Runtime (com.microsoft) beside those of the standard, "portable" the
    latter alone, "opset27" those that the standard has since opset 27: linear attention, causal convolutions.
    ``opset``: 18 to 25, by default 24; "opset27" has its own.
    ``decode``: write ``decode.onnx`` as well, the derived decoder's step: one graph for prompts and steps, whose states
    are inputs and outputs. `gatecc.onnx.Session` generates with it. It is compared with one full forward of torch after
    prefills and steps of several lengths. Beside it, ``genai_config.json`` tells onnxruntime-genai how to run it, if
    that can; the record's ``decode.genai`` says why not, and what goes wrong there.
    ``tokenizer``: one of transformers, or a processor, or a folder that holds one, whose files are written beside the
    graph; without it, those in the folder that the model was loaded from, if there are any. Nothing is downloaded.
    ``quantize``: "w8", "w4", "int8" or "fp16", "fp4" (an analysis, which changes no file), or a ``Quantize`` with its
    options; the record's ``quantized`` tells how far the outputs are from the graph that was compared with torch, on
    ``evaluation_inputs`` (inputs like the example's) if there are some, and the time of a run. It needs ONNX Runtime.
    ``functions``: the nodes of each rewrite, and of each operator that ONNX has not, are a call of a function of the
    file's own in the domain gatecc, which bears its name; runtimes put the nodes back. Not with ``quantize``.
    ``timeout``: seconds of CPU time after which the export is stopped; None is no limit.
    ``group_experts``: experts that the model spells out, or that transformers computes with "batched_mm", which copies
    a matrix for each token, are written as products by expert. False writes what the model does.
    ``example_inputs``: a tuple is positional, a dict is keyword arguments, ``(tuple, dict)`` is both.
    Raises ArgumentError, MissingPackageError, ExampleInputsError, UnsupportedModelError, CaptureError, ExportError;
    DecoderError with ``decode=True`` for a model from which no decode step can be derived.
    """
    need(*EXPORT, *(RUNTIME if quantize is not None else ()))
    if target not in TARGETS:
        raise ArgumentError("this target is not known", found=repr(target), expected=" or ".join(map(repr, TARGETS)))
    opset = _opset(opset, target)
    if timeout is not None and not timeout > 0:
        raise ArgumentError("a timeout is a time", found=str(timeout), expected="seconds above 0, or None for no limit")
    args, kwargs = split_inputs(example_inputs)
    narrow = resolve(quantize, target)
    if functions and narrow is not None:
        raise ArgumentError(
            "ONNX Runtime's quantizers do not look into functions",
            found=f"functions=True, quantize={narrow.form!r}",
            expected="one of the two",
        )
    check_model(model)
    if verify:
        check_dtypes([*model.parameters(), *model.buffers()])
    try:
        with (
            budget(timeout, lambda seconds: _too_long(model, seconds)),
            tempfile.TemporaryDirectory(dir=parent(folder), prefix=".gatecc-") as inside,
        ):
            write_beside(model, Path(inside) / "beside", tokenizer)
            how = target, opset, decode, verify, timeout, functions
            weights = group_experts, external_data, narrow, evaluation_inputs
            return _export(model, Path(folder), Path(inside), (args, kwargs), *how, *weights)
    except GateccError:
        raise
    except Exception as e:
        raise ExportError("the export failed", **blame(e), do=_UNFORESEEN) from e


def _opset(opset: int | None, target: Target) -> int:
    """The opset of the file. Raises ArgumentError, MissingPackageError."""
    if target == "opset27":
        need_opset(RAISED)
        known, best = range(RAISED, RAISED + 1), RAISED
    else:
        known, best = OPSETS, WRITTEN
    if opset is not None and opset not in known:
        expected = f"{known[0]} to {known[-1]}; {best} is best tried" if len(known) > 1 else str(best)
        raise ArgumentError(f"this opset cannot be written for target={target!r}", found=str(opset), expected=expected)
    return best if opset is None else opset


def _too_long(model: nn.Module, seconds: float) -> ExportError:
    return ExportError(
        "the export was stopped: it took too long",
        where=type(model).__name__,
        found=f"more than {seconds:g} s of CPU time",
        do="timeout=... allows more; fewer free sizes take less (a size of 1 in the example is fixed)",
    )


def _export(
    model: nn.Module,
    folder: Path,
    inside: Path,
    inputs: tuple[Any, Any],
    target: Target,
    opset: int,
    decode: bool,
    verify: bool,
    timeout: float | None,
    functions: bool,
    group_experts: bool,
    external_data: bool,
    quantize: Quantize | None,
    evaluation_inputs: Iterable[Inputs] | None,
) -> Exported:
    notes: list[str] = []
    slow = _SLOW_EXPERTS if group_experts and not any(True for _ in scopes(model)) else ()
    with evaluation(model), adapted(model), torch.no_grad(), random_states_kept(), experts_open(model, slow) as grouped:
        if grouped:
            notes.append('experts set to "batched_mm" are grouped: it copies a matrix per token (group_experts=False)')
        stage("running the model")
        call = _call(model, *inputs, notes)
        notes.extend(f"not a tensor, left out of the outputs: {what}" for what in call.left_out)
        with in_branches(model) as branches, bodies_in_branches() as bodies, transformers_loops(model) as loops:
            made = inside / "made"
            if branches:
                notes.append("a member of an ensemble runs on all samples of a batch if one of them chose it, else not")
            capture = _capture(call, functions, loops, notes)
            lowered = partial(lower, target=target, opset=opset, context=context_of(model), group_experts=group_experts)

            def make(free: Freedom, limit: float | None) -> Graph:
                stage("capturing and lowering")
                forms = registry.lowerings(target)
                graph = build(call, opset, metadata(model), forms, capture, free, limit, lowered)
                graph = replace(graph, functions=functions)
                _write(graph, made, external_data)
                return graph

            graph, compared, of_attempt = _freest(call, make, made if verify else None, timeout, external_data)
            notes += of_attempt
            if bodies:
                notes.append("a block that is skipped runs on all samples of a batch if one of them takes it, else not")
            steps = None
            if decode:
                stage("deriving the decode step")
                steps = decode_step(model, inputs, made, graph, target, opset, verify, group_experts)
            notes += _reach(model, graph, steps)
            if quantize is not None and quantize.form == "fp4":
                notes.append("fp4 is an analysis: the files hold the weights as they were")
            narrow = None
            if quantize is not None:
                stage(f"quantising ({quantize.form})")
                sizes = [c.sizes for c in compared] or [graph.dims.sizes(call.leaves)]
                narrow = quantized(
                    call,
                    graph,
                    made,
                    quantize,
                    steps,
                    sizes=sizes,
                    evaluation=evaluation_inputs,
                    external=external_data,
                )
            shutil.copytree(inside / "beside", made, dirs_exist_ok=True)
            if narrow is not None and narrow.decode is not None and steps is not None:
                steps = _narrowed(steps, narrow, made)
            result = describe(folder, made, graph, compared, notes, steps)
            if narrow is not None:
                result = replace(result, operators=narrow.operators, quantized=narrow)
            write_manifest(made / MANIFEST, model, result)
            write_report(made, type(model).__qualname__, result, made_by())
            move(made, folder)
    return result


def _narrowed(steps: Decode, narrow: Quantized, made: Path) -> Decode:
    """What became of the step. Casts may stand between a state and the node that would go on in its buffer."""
    assert narrow.decode is not None
    states = tuple(replace(s, shared=s.shared and s.output in narrow.decode.buffers) for s in steps.states)
    if not steps.genai.refused:
        no_buffers(made, states)
    encoder = steps.encoder
    if encoder is not None and narrow.encoder is not None:
        encoder = replace(encoder, operators=narrow.encoder.operators)
    return replace(steps, operators=narrow.decode.operators, states=states, encoder=encoder)


def _reach(model: nn.Module, graph: Graph, steps: Decode | None) -> list[str]:
    """What there is to say of long texts."""
    notes: list[str] = []
    if any("rotary" in outcome.became for outcome in graph.outcomes):
        notes.append(
            f"positions reach to {context_of(model)} tokens, as the model's config says: ONNX Runtime refuses longer "
            "inputs, where torch goes on; export with a larger max_position_embeddings for them"
        )
    if steps is not None and steps.kept:
        notes.append(f"prompts of decode.onnx are padded on the left, and its attention keeps the mask: {steps.kept}")
    windows = sorted({state.window for state in (steps.states if steps else ()) if state.window is not None})
    if windows:
        notes.append(
            f"decode.onnx keeps the keys of all tokens, also where windows of {windows} read no more than these"
        )
    return notes


def _write(graph: Graph, made: Path, external: bool) -> None:
    stage("writing and checking")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    write(graph, made, external=external)
    check(made / MODEL, graph.places, apart=graph.apart)


def _freest(
    call: Call, make: Callable[[Freedom, float | None], Graph], made: Path | None, timeout: float | None, external: bool
) -> tuple[Graph, list[Compared], list[str]]:
    """The graph with as many free sizes as can be had; a note says which had to be given up, and why.

    ``made`` is where ``make`` writes it; None if it is not to be compared.
    """
    kinds = [f for i, f in enumerate(FREEDOMS) if i == 0 or _axes(call, f) != _axes(call, FREEDOMS[i - 1])]
    given_up: list[str] = []
    for kind in kinds:
        notes: list[str] = []
        try:
            graph = make(kind, _limit(call, kind, timeout))
        except (CaptureError, ExportError) as e:
            if kind is kinds[-1] or any(word in e.found for word in _HOPELESS):
                raise
            failure = e
        else:
            if made is None:
                return graph, [], [*given_up, "not compared"]
            stage("comparing with torch")
            outcome = compare(call, graph, made / MODEL, notes)
            if outcome.failure is None:
                more = given_up or ([] if outcome.fixed else settled(call, graph))
                return graph, _fixed(graph, outcome, made, external), [*more, *notes]
            if kind is kinds[-1]:
                raise located(outcome, call, graph, made / MODEL)
            failure = outcome.failure
        then = kinds[kinds.index(kind) + 1]
        given_up = [f"{_GIVEN_UP[then]} as in the example, for free ones fail: {failure.what}; {failure.found}"]
    raise AssertionError("the last attempt returns or raises")


def _limit(call: Call, kind: Freedom, timeout: float | None) -> float | None:
    """The CPU time for a capture: little where height and width of images are free."""
    if kind is not Freedom.ALL or _axes(call, kind) == _axes(call, Freedom.NO_IMAGE_SIDES):
        return None
    return _IMAGE_SIDES if timeout is None else min(_IMAGE_SIDES, timeout / 4)


def _fixed(graph: Graph, outcome: Outcome, made: Path, external: bool) -> list[Compared]:
    """What was compared; sizes that the model itself does not run at become numbers in the graph."""
    if not outcome.fixed:
        return outcome.compared
    graph.fix(outcome.fixed)
    _write(graph, made, external)
    return [replace(c, sizes={k: v for k, v in c.sizes.items() if k not in outcome.fixed}) for c in outcome.compared]


def _axes(call: Call, free: Freedom) -> list[set[int]]:
    return free_axes(call.leaves, free)


def _call(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], notes: list[str]) -> Call:
    """The flat call. A batch of one sample is doubled if the model allows it: torch.export takes a size 1 as fixed."""
    call = flat_call(model, args, kwargs)
    if call.leaves[0].dim() == 0 or call.leaves[0].shape[0] != 1:
        return call
    try:
        doubled: tuple[Any, Any] = map_tensors(_doubled, (args, kwargs))
        double = flat_call(model, *doubled)
    except (ExampleInputsError, OpaqueArgumentError):
        notes.append("the batch size is fixed at 1: the model does not run on two samples")
        return call
    if not all(map(_per_sample, call.results, double.results)):
        notes.append("the batch size is fixed at 1: two samples change more than the first axis of the outputs")
        return call
    return double


def _capture(call: Call, functions: bool, loops: Collection[str], notes: list[str]) -> Capture | None:
    """How a transformed model is captured whose scopes cannot be traced each by itself, for they would see masks as
    inputs, would hold loops over tokens as they were when they were rewritten, or would not tell what is of which
    rewrite: as a Program of the whole model, with the rewrites done on it. None for all others."""
    model = call.flat.m
    masks = reads_masks(model)
    if not masks and not ((functions or loops) and any(True for _ in scopes(model))):
        return None
    args, kwargs = call.arguments(call.leaves)
    forward = call.flat.tensors

    def capture(axes: Axes) -> Program:
        try:
            return whole_program(model, args, kwargs, dynamic=axes, forward=forward)
        except GateccError as e:
            if masks:
                raise
            note = f"the functions have no names of rewrites, which are not found again in the whole model: {e.found}"
            notes.extend([note] if functions and note not in notes else [])
            return captured(call, axes)

    return capture


def _per_sample(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether an output for two samples is like that for one, with twice or as many rows."""
    rows = one.shape[:1], torch.Size([2 * n for n in one.shape[:1]])
    return one.dim() == two.dim() and one.shape[1:] == two.shape[1:] and two.shape[:1] in rows


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x
