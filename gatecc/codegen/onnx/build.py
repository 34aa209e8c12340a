"""Build: the Program of a flat call through torch.onnx to an ONNX model that is fit to be handed on.

It is stamped with an IR version that runtimes know, its free dimensions have names, every value has a recorded type
and shape, and nothing in it tells on which machine it was made.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from enum import Enum, auto
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.export import ExportedProgram

from gatecc.capture.budget import budget
from gatecc.capture.export import capture as capture_model
from gatecc.capture.export import quiet
from gatecc.capture.exported import exported_program
from gatecc.capture.guards import Check, compile_guards, size_guards
from gatecc.codegen.onnx.attention import ATTENTION, attention
from gatecc.codegen.onnx.branches import put_in_branches
from gatecc.codegen.onnx.clean import clean, hold_constants, name_ends
from gatecc.codegen.onnx.dims import Dims, fixed
from gatecc.codegen.onnx.functions import with_functions
from gatecc.codegen.onnx.grouped import split_groups
from gatecc.codegen.onnx.indices import long_indices
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.lower import FailedLoweringError
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.marks import mark, marks
from gatecc.codegen.onnx.opset import FREELY_LOADED, raise_opset, written_at
from gatecc.codegen.onnx.padded import fold_padded_weights
from gatecc.codegen.onnx.place import blame, operator, place, reason
from gatecc.codegen.onnx.scalars import scalars_as_tensors
from gatecc.codegen.onnx.sigmoids import exact_sigmoids
from gatecc.codegen.onnx.spelled import spell_out
from gatecc.codegen.onnx.stable import FORMS
from gatecc.codegen.onnx.stream import save
from gatecc.codegen.onnx.tidy import tidy
from gatecc.errors import CaptureError, ExportError
from gatecc.ir.loops import free_lengths
from gatecc.ir.ops import mutates
from gatecc.ir.outcome import Outcome
from gatecc.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 10  # the newest that every ONNX Runtime since 1.18 loads
APART = 2**28  # bytes of weights from which on a file is checked and run in a process of its own
EXTERNAL = 3 * 2**29  # bytes of weights above which they get a file of their own: protobuf ends at 2 GiB
MODEL, DATA = "model.onnx", "model.onnx.data"
_WHERE = "gatecc.inspect says which submodules can be captured; write data-dependent code with torch.where"
_OTHER_OPERATOR = "write it with other operators, or select sites or gates without it"
_OF_TORCH = ("aten.", "prim.", "prims.")


Axes = Sequence[set[int]]  # of each input
Capture = Callable[[Axes], Program]
Lower = Callable[[Program, Collection[str]], Sequence[Outcome]]


class Freedom(Enum):
    """Which sizes of the inputs stay free: all, all but height and width of images, or the first axis alone."""

    ALL = auto()
    NO_IMAGE_SIDES = auto()
    BATCH = auto()


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model with the dims that stay free in it; ``accepts(leaves)`` says whether it holds for these sizes."""

    model: ir.Model
    dims: Dims
    accepts: Check
    places: Mapping[str, str]
    """Which operator of the model a node comes from."""
    program: Callable[[], ExportedProgram]
    """Captures the call again, as it was before anything was put in its ONNX form."""
    outcomes: Sequence[Outcome] = ()
    """What the lowerings say of each place that they looked at."""
    functions: bool = False
    """Whether rewrites and operators are written as calls of functions."""

    @property
    def written(self) -> ir.Model:
        """The model as the file has it."""
        return with_functions(self.model) if self.functions else self.model

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator occurs."""
        counts = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in self.model.graph.all_nodes())
        return dict(sorted(counts.items()))

    @property
    def nbytes(self) -> int:
        """The bytes of its weights."""
        held = (v.const_value for g in self.model.graphs() for v in g.initializers.values())
        return sum(tensor.nbytes for tensor in held if tensor is not None)

    @property
    def apart(self) -> bool:
        """Whether it is checked and run in a process of its own: its weights are many, or ONNX Runtime has to be told
        that it may load this opset, which is done by a variable of the environment."""
        return self.nbytes > APART or self.model.opset_imports[""] > FREELY_LOADED

    def shapes(self, values: Any) -> dict[str, list[int | str]]:
        """Name and shape of graph inputs or outputs."""
        return {v.name: [d if isinstance(d, int) else str(d.value) for d in v.shape] for v in values}

    def fix(self, sizes: Mapping[str, int]) -> None:
        """Make free dimensions numbers, in the whole model."""
        import onnx_ir as ir

        graph = self.model.graph
        ends = (*graph.inputs, *graph.initializers.values())
        for value in (*ends, *(v for n in graph.all_nodes() for v in n.outputs)):
            if value.shape is not None:
                value.shape = ir.Shape([d if isinstance(d, int) else fixed(d.value, sizes) for d in value.shape])


def build(
    call: Call,
    opset: int,
    metadata: Mapping[str, str],
    lowerings: Mapping[Any, Lowering],
    capture: Capture | None = None,
    free: Freedom = Freedom.ALL,
    limit: float | None = None,
    lower: Lower | None = None,
) -> Graph:
    """Export one call; gradients are off. Raises CaptureError if a capture fails, ExportError if torch.onnx does.

    ``lowerings`` are the ONNX forms of operators that torch.onnx does not know, by overload; ``lower`` edits the
    captured program in place, without lowerings of some names, and says what became of it. One that fails is left out:
    an outcome says so.
    ``capture`` captures the call with these axes of its inputs free, by default with scopes traced as they run;
    ``limit`` is the CPU time in seconds that it may take.
    """
    capture = capture or partial(captured, call)
    axes = free_axes(call.leaves, free)
    source, program = _program(call, capture, axes, limit)
    numbers = _fixed_symbols(program, lowerings)
    if numbers:  # sizes that an ONNX node holds as attributes
        axes = [
            {i for i in of_one if not _holds(x, i, numbers)}
            for of_one, x in zip(axes, _values(program, call), strict=True)
        ]
        source, program = _program(call, capture, axes, limit)
    dims = Dims.of(_values(program, call), call.leaves, call.inputs)
    accepts = compile_guards(size_guards(program, _placeholders(program, call)))
    outcomes: list[Outcome] = []
    if lower is not None:
        source, outcomes = _without_failures(lower, source, lambda: _program(call, capture, axes, limit)[0])
    if outcomes:
        program = exported_program(source)
    _prepare(program, lowerings)
    known = marks(program, lowerings)
    model = _convert(_decomposed(program, opset, lowerings), call, opset)
    mark(model, known)
    raise_opset(model, opset)
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "gatecc", metadata.get("gatecc.version", "")
    places = {n.name: place(n.meta["node"]) for n in model.graph.all_nodes() if n.name and "node" in n.meta}
    clean(model, dims)
    model.metadata_props.update(metadata)
    return Graph(model, dims, accepts, places, lambda: _program(call, capture, axes, None)[1], outcomes)


def _without_failures(lower: Lower, source: Program, again: Callable[[], Program]) -> tuple[Program, list[Outcome]]:
    """A lowered program, and what became of it. A lowering that fails is left out, and the program captured again."""
    failed: dict[str, Outcome] = {}
    while True:
        try:
            return source, [*lower(source, tuple(failed)), *failed.values()]
        except FailedLoweringError as e:
            why = f"the lowering failed and was left out: {reason(e.cause)}"
            failed[e.lowering] = Outcome(e.lowering, "", "", "the whole graph", reason=why)
            source = again()


def free_axes(leaves: Sequence[torch.Tensor], free: Freedom) -> list[set[int]]:
    """The axes of each input that may vary. torch.export takes a size of 1 as fixed."""

    def may(x: torch.Tensor, axis: int) -> bool:
        if free is Freedom.BATCH:
            return axis == 0
        return free is Freedom.ALL or not (x.dim() >= 4 and x.is_floating_point() and axis >= 2)

    return [{i for i, size in enumerate(x.shape) if size > 1 and may(x, i)} for x in leaves]


def _placeholders(program: ExportedProgram, call: Call) -> list[fx.Node]:
    return [n for n in program.graph.nodes if n.op == "placeholder"][-len(call.leaves) :]


def _values(program: ExportedProgram, call: Call) -> list[torch.Tensor]:
    return [n.meta["val"] for n in _placeholders(program, call)]


def _fixed_symbols(program: ExportedProgram, lowerings: Mapping[Any, Lowering]) -> set[Any]:
    """The symbols of sizes that the forms of operators need as numbers."""
    called = [(n, lowerings[n.target]) for n in _nodes(program) if n.target in lowerings]
    sizes = [size for node, lowering in called for size in lowering.fixed(node)]
    return {symbol for s in sizes if isinstance(s, torch.SymInt) for symbol in s.node.expr.free_symbols}


def _holds(x: torch.Tensor, axis: int, symbols: Set[Any]) -> bool:
    """Whether the size of an axis of a traced input depends on one of these symbols."""
    size = x.shape[axis]
    return isinstance(size, torch.SymInt) and bool(size.node.expr.free_symbols & symbols)


def write(graph: Graph, folder: Path, *, external: bool = False) -> None:
    """Write ``model.onnx``, and ``model.onnx.data`` if the weights are many or it is asked for."""
    save({MODEL: graph.written}, folder, DATA if external or graph.nbytes > EXTERNAL else None)


def captured(call: Call, axes: Axes) -> Program:
    """The call as a Program."""
    args, kwargs = call.arguments(call.leaves)
    try:
        return capture_model(call.flat.m, args, kwargs, forward=call.flat.tensors, dynamic=axes)
    except CaptureError as e:
        raise CaptureError(
            "torch.export could not capture the model", where=type(call.flat.m).__name__, found=e.found, do=_WHERE
        ) from e


def _program(call: Call, capture: Capture, axes: Axes, limit: float | None) -> tuple[Program, ExportedProgram]:
    where = type(call.flat.m).__name__
    try:
        with budget(limit, lambda seconds: _too_long(where, seconds)), quiet(), _quiet(), free_lengths():
            program = capture(axes)
            return program, exported_program(program)
    except CaptureError:
        raise
    except Exception as e:
        raise CaptureError(
            "torch.export could not capture the model",
            where=where,
            found=reason(e),
            do=_WHERE,
        ) from e


def _too_long(where: str, seconds: float) -> CaptureError:
    return CaptureError(
        "the capture was stopped: it took too long",
        where=where,
        found=f"more than {seconds:g} s of CPU time in torch.export",
        do="timeout=... allows more; fewer free sizes take less (a size of 1 in the example is fixed)",
    )


def _prepare(program: ExportedProgram, lowerings: Mapping[Any, Lowering]) -> None:
    """Say what ONNX Runtime computes otherwise in a form that it computes right, in place. Raises ExportError."""
    for node in _nodes(program):
        _check_form(node, lowerings)
        if node.target is torch.ops.aten.view.default:
            node.target = torch.ops.aten.reshape.default  # a lowering may have changed the layout of what it reads
    exact_sigmoids(program)
    long_indices(program)
    scalars_as_tensors(program, float64=False)


def _decomposed(program: ExportedProgram, opset: int, lowerings: Mapping[Any, Lowering]) -> ExportedProgram:
    """The program in operators that torch.onnx writes."""
    own = {operator: lowering.form for operator, lowering in lowerings.items() if lowering.form is not None}
    forms = {**FORMS, ATTENTION: attention(opset), **own}
    if not any(n.target in forms for n in _nodes(program)):
        scalars_as_tensors(program, float64=True)
        return program
    try:
        with _quiet():
            program = program.run_decompositions(forms)
        scalars_as_tensors(program, float64=True)
        return program
    except Exception as e:
        raise ExportError("an operator cannot be put in its ONNX form", **blame(e), do=_OTHER_OPERATOR) from e


def _check_form(node: fx.Node, lowerings: Mapping[Any, Lowering]) -> None:
    """Raise ExportError for a call that has no ONNX form."""
    if node.target in lowerings:
        lowerings[node.target].check(node)
    elif mutates(node) and not operator(node).startswith(_OF_TORCH):
        raise ExportError(
            "this operator has no ONNX form",
            where=place(node),
            found="an operator of a library that writes to its inputs",
            do="let it return a new tensor instead",
        )


def _nodes(program: ExportedProgram) -> Iterator[fx.Node]:
    """All nodes of a program, those of its branches and loops too."""
    for module in program.graph_module.modules():
        if isinstance(module, fx.GraphModule):
            yield from module.graph.nodes


def _convert(program: ExportedProgram, call: Call, opset: int) -> ir.Model:
    from gatecc.codegen.onnx.translations import known_translations  # imports onnxscript, which takes a second

    try:
        with _quiet(), known_translations():
            made = torch.onnx.export(program, dynamo=True, opset_version=written_at(opset), verbose=False)
    except Exception as e:
        raise ExportError("torch.onnx cannot write this model", **blame(e), do=_OTHER_OPERATOR) from e
    assert made is not None
    hold_constants(made.model.graph)
    split_groups(made.model)
    fold_padded_weights(made.model.graph)
    spell_out(made.model, written_at(opset))
    put_in_branches(made.model.graph)
    tidy(made.model)
    name_ends(made.model.graph, call)
    return made.model


@contextmanager
def _quiet() -> Generator[None]:
    """torch.onnx prints its progress; what fails raises."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "torch._export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
