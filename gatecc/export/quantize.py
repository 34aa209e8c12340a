"""Quantize: an exported graph in fewer bits, kept if its outputs and its time, which are measured, allow it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from gatecc.capture import signature
from gatecc.codegen.onnx.build import DATA, MODEL, Graph
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.runtime import Session, check
from gatecc.codegen.onnx.worker import Apart, Worker
from gatecc.engine.analyse import Inputs
from gatecc.errors import ArgumentError, ExportError
from gatecc.export.accuracy import Accuracy, Gathered, tokens_of
from gatecc.export.compare import Sizes
from gatecc.export.decode import DECODE, Decode
from gatecc.export.encoder import ENCODER, Encoding
from gatecc.export.quantized_steps import Prompt, prompt, step
from gatecc.export.routes import routes

Form = Literal["w8", "w4", "int8", "fp16", "fp4"]
FORMS: tuple[str, ...] = get_args(Form)
_BLOCKS = (16, 32, 64, 128, 256)
_SLOWER, _NOISE = 1.15, 2e-5  # times, and seconds, from which on a graph is slower
_RACE = 0.3  # seconds of CPU time for each size
_WRONG = 0.8  # the cosine of outputs below which a graph computes something else


@dataclass(frozen=True)
class Quantize:
    """How the weights of a graph are held.

    ``form``: "w8" and "w4" hold the matrices of products in blocks of integers with a scale each (MatMulNBits of ONNX
    Runtime: for decoding, which reads weights); "int8" computes products in integers, scales found when it runs (for
    long inputs); "fp16" is for GPUs; "fp4" is an analysis, which changes no file: what matrices of products in numbers
    of four bits (E2M1, a scale for each column) would do to the outputs (LLM-FP4, Liu et al. 2023). A product by whose
    result something is chosen (a router) keeps its bits there.
    ``block``: how many entries of a column share a scale; by default 64 for "w8", for which ONNX Runtime has a faster
    kernel (0.75 of the time of 32), 32 for "w4". ``accuracy_level``: what products are computed in, 4 is int8.
    ``embedding``, ``head``: whether the table of tokens, and the last product, are quantised too.
    ``keep``: patterns of weights or nodes that stay as they are.
    """

    form: Form
    block: int | None = None
    accuracy_level: int = 4
    embedding: bool = False
    head: bool = True
    keep: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.form not in FORMS:
            raise ArgumentError("this form of weights is not known", found=repr(self.form), expected=", ".join(FORMS))
        if self.form == "fp4" and (self.block is not None or self.embedding):
            raise ArgumentError(
                "this option is none of the analysis",
                found=f"fp4, block {self.block}, embedding {self.embedding}",
                expected="neither: each column of a product has a scale",
            )
        if self.block is not None and self.form in ("int8", "fp16"):
            raise ArgumentError(
                "this form has no blocks",
                found=f"{self.form}, block {self.block}",
                expected="no block: int8 has a scale for each matrix, fp16 none",
                do='"w8" and "w4" hold weights in blocks',
            )
        if self.block is None:
            object.__setattr__(self, "block", 64 if self.form == "w8" else 32)
        if self.block not in _BLOCKS:
            raise ArgumentError("this block cannot be had", found=str(self.block), expected=f"one of {_BLOCKS}")
        if self.embedding and self.form == "w8":
            raise ArgumentError(
                "ONNX Runtime's quantizer holds tables in 4 bits alone", found="w8 with embedding=True", expected="w4"
            )


@dataclass(frozen=True)
class Quantized:
    """What became of the products of model.onnx: what they are now, which were left and why, all operators, and the
    bytes of the weights. ``on`` says which inputs ``accuracy`` is of; ``time`` is the CPU time of one run on one
    thread, divided by that of the graph before. ``decode`` and ``encoder`` are the same of decode.onnx and
    encoder.onnx, if there are any."""

    options: Quantize
    quantized: dict[str, int]
    kept: dict[str, int]
    operators: dict[str, int]
    bytes_before: int
    bytes_after: int
    on: str
    accuracy: tuple[Accuracy, ...]
    time: dict[str, float]
    decode: QuantizedStep | None = None
    routes: dict[str, float] = field(default_factory=dict[str, float])
    """"fp4": for each node that chooses (experts, say), the share of its choices that would stay."""
    encoder: QuantizedEncoder | None = None


@dataclass(frozen=True)
class QuantizedStep:
    """What became of decode.onnx: its operators, its logits for whole prompts, None if the evaluation inputs are none
    that it takes, and the time of a step of one sample. ``buffers``: the next states that may be in the buffers of the
    states that they continue."""

    operators: dict[str, int]
    accuracy: Accuracy | None
    time: dict[str, float]
    buffers: tuple[str, ...] = ()


@dataclass(frozen=True)
class QuantizedEncoder:
    """What became of encoder.onnx: its operators, its outputs that are numbers (keys and values of cross-attention),
    and its time."""

    operators: dict[str, int]
    accuracy: tuple[Accuracy, ...]
    time: dict[str, float]


def resolve(given: str | Quantize | None, target: str) -> Quantize | None:
    """The options of a name. Raises ArgumentError."""
    if given is None:
        return None
    options = given if isinstance(given, Quantize) else Quantize(given)  # pyright: ignore[reportArgumentType]
    if target != "ort" and options.form in ("w4", "w8"):
        raise ArgumentError(
            "weights in blocks are an operator of ONNX Runtime",
            found=f"{options.form}, target={target!r}",
            expected="int8 or fp16, or target='ort'",
        )
    return options


def quantized(
    call: Call,
    graph: Graph,
    made: Path,
    options: Quantize,
    decode: Decode | None = None,
    *,
    sizes: Sequence[Sizes],
    evaluation: Iterable[Inputs] | None,
    external: bool,
) -> Quantized:
    """Put quantised graphs in the place of those in a folder; ``model.onnx``, which is ``graph``, is compared with what
    it was on ``evaluation``, else at ``sizes``, and so is decode.onnx.

    Raises ExportError if nothing of it can be quantised, if it computes something else, or if it is slower.
    """
    inside = made / "quantized"
    inside.mkdir()
    analysis = options.form == "fp4"
    paths = [made / MODEL] if analysis else sorted(made.glob("*.onnx"), key=lambda p: p.name != MODEL)
    decode = None if analysis else decode
    apart = graph.apart
    with closing(Apart() if apart else Worker()) as worker:
        settings = {**asdict(options), "external": external, "data": DATA}
        told, *others = worker.quantize([str(p) for p in paths], str(inside), options.form, settings)
        if not told["quantized"] and options.form != "fp16":
            raise ExportError(
                "nothing in this graph can be quantised",
                found=", ".join(f"{why}: {n}" for why, n in told["kept"].items())
                or "no product with a constant matrix",
                do="leave quantize out",
            )
        for path in paths:
            check(inside / path.name, graph.places, apart=apart)
        samples = (
            [graph.dims.resized(call.leaves, s) for s in sizes] if evaluation is None else _leaves(call, evaluation)
        )
        pair = made / MODEL, inside / MODEL
        accuracy = _accuracy(call, graph, *pair, samples)
        chosen = routes(call, graph, *pair, samples) if analysis else {}
        times = {} if options.form in ("fp16", "fp4") else _times(worker, call, graph, pair, sizes)
        of_others = dict(zip((path.name for path in paths[1:]), others, strict=True))
        measured = worker, call, graph, made, options
        narrow = None if decode is None else _step(*measured, decode, samples, of_others[DECODE])
        encoder = None
        if decode is not None and decode.encoder is not None and ENCODER in of_others:
            encoder = _encoded(*measured, decode, decode.encoder, samples, of_others[ENCODER])
    on = f"{len(samples)} inputs of the user" if evaluation is not None else "the example inputs"
    if analysis:
        shutil.rmtree(inside)
        of_file = graph.operators, graph.nbytes, graph.nbytes
        return Quantized(options, told["quantized"], told["kept"], *of_file, on, tuple(accuracy), {}, None, chosen)
    _refuse(options, accuracy, times)
    if narrow is not None:
        _refuse(options, [] if narrow.accuracy is None else [narrow.accuracy], narrow.time)
    if encoder is not None:
        _refuse(options, encoder.accuracy, encoder.time)
    (made / DATA).unlink(missing_ok=True)
    for written in sorted(inside.iterdir()):
        os.replace(written, made / written.name)
    inside.rmdir()
    return Quantized(
        options,
        told["quantized"],
        told["kept"],
        told["operators"],
        graph.nbytes,
        told["bytes"],
        on,
        tuple(accuracy),
        times,
        narrow,
        encoder=encoder,
    )


def _step(
    worker: Worker,
    call: Call,
    graph: Graph,
    made: Path,
    options: Quantize,
    decode: Decode,
    samples: Sequence[Sequence[torch.Tensor]],
    told: Mapping[str, Any],
) -> QuantizedStep:
    """decode.onnx as it was and as it is, each behind its own encoder.onnx, if there is one."""
    prompts = [p for leaves in samples if (p := prompt(decode, call.inputs, leaves)) is not None]
    buffers = tuple(told["buffers"])
    if not prompts:
        return QuantizedStep(told["operators"], None, {}, buffers)
    gathered, contexts = Gathered(f"{DECODE}: logits"), list[dict[str, torch.Tensor]]()
    with ExitStack() as opened:
        one, other = (_Steps(opened, folder, graph, decode.encoder, contexts) for folder in (made, made / "quantized"))
        for p in prompts:
            gathered.add(one(p), other(p), p.ids, p.mask)
    times: dict[str, float] = {}
    if options.form != "fp16":
        past, feeds = step(decode, prompts[0])
        feeds |= {name: x[:1] for name, x in contexts[0].items()}
        arrays = {name: x.detach().cpu().numpy() for name, x in feeds.items() if name in decode.inputs}
        paths = [str(folder / DECODE) for folder in (made, made / "quantized")]
        times[f"a step behind {past} tokens"] = _ratio(*worker.race(paths, arrays, _RACE))
    return QuantizedStep(told["operators"], gathered.result(), times, buffers)


class _Steps:
    """decode.onnx of a folder, with what it reads of encoder.onnx; ``contexts`` collects that."""

    def __init__(
        self,
        opened: ExitStack,
        folder: Path,
        graph: Graph,
        encoder: Encoding | None,
        contexts: list[dict[str, torch.Tensor]],
    ) -> None:
        self._decode = opened.enter_context(closing(Session(folder / DECODE, graph.places, apart=graph.apart)))
        self._encoder, self._session, self._contexts = encoder, None, contexts
        if encoder is not None and encoder.outputs:
            self._session = opened.enter_context(closing(Session(folder / ENCODER, graph.places, apart=graph.apart)))

    def __call__(self, of: Prompt) -> torch.Tensor:
        """The logits of a prompt."""
        context: dict[str, torch.Tensor] = {}
        if self._encoder is not None and self._session is not None:
            given = of.of_encoder(self._encoder)
            found = self._session.run(list(given), list(given.values()))
            context = dict(zip(self._encoder.outputs, found, strict=True))
        passed = {name: of.feeds[name] for name in (self._encoder.passed if self._encoder else ())}
        self._contexts.append({**context, **passed})
        feeds = {**of.feeds, **context}
        return self._decode.run(list(feeds), list(feeds.values()))[0]


def _encoded(
    worker: Worker,
    call: Call,
    graph: Graph,
    made: Path,
    options: Quantize,
    decode: Decode,
    encoder: Encoding,
    samples: Sequence[Sequence[torch.Tensor]],
    told: Mapping[str, Any],
) -> QuantizedEncoder:
    """encoder.onnx as it was and as it is."""
    paths = made / ENCODER, made / "quantized" / ENCODER
    given = [p.of_encoder(encoder) for leaves in samples if (p := prompt(decode, call.inputs, leaves)) is not None]
    gathered = [Gathered(f"{ENCODER}: {name}") for name in encoder.outputs]
    with (
        closing(Session(paths[0], graph.places, apart=graph.apart)) as one,
        closing(Session(paths[1], graph.places, apart=graph.apart)) as other,
    ):
        for feeds in given:
            results = (s.run(list(feeds), list(feeds.values())) for s in (one, other))
            for g, x, y in zip(gathered, *results, strict=True):
                if x.is_floating_point():
                    g.add(x, y, None, None)
    times: dict[str, float] = {}
    if options.form != "fp16" and given:
        arrays = {name: x.detach().cpu().numpy() for name, x in given[0].items()}
        sizes = ", ".join(str(tuple(x.shape)) for x in arrays.values())
        times[sizes] = _ratio(*worker.race([str(p) for p in paths], arrays, _RACE))
    return QuantizedEncoder(told["operators"], tuple(g.result() for g in gathered if g.rows), times)


def _ratio(before: float, after: float) -> float:
    """Of two times; 1 if the second is longer by less than can be measured."""
    return after / before if after - before > _NOISE or after < before else 1.0


def _leaves(call: Call, evaluation: Iterable[Inputs]) -> list[tuple[torch.Tensor, ...]]:
    """The tensors of each input, which has the form of the example's."""
    samples: list[tuple[torch.Tensor, ...]] = []
    for inputs in evaluation:
        _, leaves = signature.flatten(*signature.split_inputs(inputs))
        if [(x.dtype, x.dim()) for x in leaves] != [(x.dtype, x.dim()) for x in call.leaves]:
            raise ArgumentError(
                "these evaluation inputs are not like the example inputs",
                found=", ".join(f"{x.dtype} {tuple(x.shape)}" for x in leaves),
                expected=", ".join(
                    f"{n}: {x.dtype} {tuple(x.shape)}" for n, x in zip(call.inputs, call.leaves, strict=True)
                ),
            )
        samples.append(tuple(leaves))
    if not samples:
        raise ArgumentError("there are no evaluation inputs", expected="inputs like the example's")
    return samples


def _accuracy(
    call: Call, graph: Graph, before: Path, after: Path, samples: Sequence[Sequence[torch.Tensor]]
) -> list[Accuracy]:
    gathered = [Gathered(name) for name in call.outputs]
    apart = graph.apart
    with (
        closing(Session(before, graph.places, apart=apart)) as one,
        closing(Session(after, graph.places, apart=apart)) as other,
    ):
        for leaves in samples:
            ids, mask = tokens_of(call.inputs, leaves)
            results = (s.run(call.inputs, leaves) for s in (one, other))
            for g, x, y in zip(gathered, *results, strict=True):
                g.add(x, y, ids, mask)
    return [g.result() for g in gathered]


def _times(
    worker: Worker, call: Call, graph: Graph, paths: tuple[Path, Path], sizes: Sequence[Sizes]
) -> dict[str, float]:
    """At the fewest and at the most entries of its inputs: products of few rows read weights, those of many compute."""
    ordered = sorted((dict(s) for s in sizes), key=lambda s: sum(s.values()))
    result: dict[str, float] = {}
    for one in (ordered[0], ordered[-1]):
        leaves = graph.dims.resized(call.leaves, one)
        feeds = {n: x.detach().cpu().numpy() for n, x in zip(call.inputs, leaves, strict=True)}
        feeds = {i.name: feeds[i.name] for i in graph.model.graph.inputs if i.name in feeds}
        before, after = worker.race([str(p) for p in paths], feeds, _RACE)
        result[", ".join(f"{k} {v}" for k, v in one.items()) or "example"] = _ratio(before, after)
    return result


def _refuse(options: Quantize, accuracy: Sequence[Accuracy], times: Mapping[str, float]) -> None:
    wrong = [a for a in accuracy if a.cosine < _WRONG]
    if wrong:
        raise ExportError(
            "the quantised graph computes something else",
            where=wrong[0].output,
            found=f"{options.form}: a cosine of {wrong[0].cosine:.3g} to the graph as it was",
            expected=f"at least {_WRONG}",
            do='"w8" is more exact than "w4" and "int8"; Quantize(..., keep=("*.weight",)) leaves weights out',
        )
    if times and min(times.values()) > _SLOWER:
        measured = "; ".join(f"{ratio:.2f}x at {sizes}" for sizes, ratio in times.items())
        raise ExportError(
            "ONNX Runtime runs the quantised graph slower on this machine",
            found=f"{options.form}, accuracy_level {options.accuracy_level}, block {options.block}: {measured}",
            expected="less than the graph as it was at some size",
            do="accuracy_level=4 computes in integers; small models gain nothing",
        )
