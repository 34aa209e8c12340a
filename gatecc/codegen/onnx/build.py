"""Build: a flat call through torch.export and torch.onnx to an ONNX model that is fit to be handed on.

It is stamped with an IR version that runtimes know, its free dimensions have names, every value has a recorded type
and shape, and nothing in it tells on which machine it was made.
"""

from __future__ import annotations

import io
import logging
import warnings
from collections import Counter
from collections.abc import Generator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram

from gatecc.capture.guards import Check, compile_guards, size_guards
from gatecc.codegen.onnx.dims import Dims
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.linear_attention import lower_linear_attention
from gatecc.codegen.onnx.masks import spell_out_masks
from gatecc.codegen.onnx.sequences import lower_sequences
from gatecc.errors import CaptureError, ExportError

if TYPE_CHECKING:
    import onnx_ir as ir

IR_VERSION = 10  # the newest that every ONNX Runtime since 1.18 loads
EXTERNAL = 3 * 2**29  # bytes of weights above which they get a file of their own: protobuf ends at 2 GiB
MODEL, DATA = "model.onnx", "model.onnx.data"


@dataclass(frozen=True, eq=False)
class Graph:
    """An ONNX model with the dims that stay free in it; ``accepts(leaves)`` says whether it holds for these sizes."""

    model: ir.Model
    dims: Dims
    accepts: Check

    @property
    def operators(self) -> dict[str, int]:
        """How often each operator occurs."""
        counts = Counter(f"{n.domain}::{n.op_type}".removeprefix("::") for n in self.model.graph.all_nodes())
        return dict(sorted(counts.items()))

    def shapes(self, values: Any) -> dict[str, list[int | str]]:
        """Name and shape of graph inputs or outputs."""
        return {v.name: [d if isinstance(d, int) else str(d.value) for d in v.shape] for v in values}


def build(call: Call, opset: int, metadata: Mapping[str, str], said: nn.Module | None = None) -> Graph:
    """Export one call; gradients are off. Raises CaptureError if torch.export fails, ExportError if torch.onnx does.

    ``said`` is a module that computes what ``call.flat`` does in a way that is easier to export.
    """
    program = _program(call, said or call.flat)
    placeholders = [n for n in program.graph.nodes if n.op == "placeholder"][-len(call.leaves) :]
    dims = Dims.of([n.meta["val"] for n in placeholders], call.leaves, call.inputs)
    accepts = compile_guards(size_guards(program, placeholders))
    program = lower_sequences(lower_linear_attention(program))
    spell_out_masks(program)
    model = _convert(program, call, opset)
    if model.opset_imports.get("") != opset:
        raise ExportError(
            "torch.onnx wrote another opset than it was asked for",
            found=f"opset {model.opset_imports.get('')}",
            expected=f"opset {opset}",
            do="use opset=24",
        )
    model.ir_version = IR_VERSION
    model.producer_name, model.producer_version = "gatecc", metadata.get("gatecc.version", "")
    _clean(model, dims)
    model.metadata_props.update(metadata)
    return Graph(model, dims, accepts)


def write(graph: Graph, folder: Path) -> None:
    """Write ``model.onnx``, and ``model.onnx.data`` if the weights are many."""
    import onnx_ir as ir

    size = sum(v.const_value.nbytes for v in graph.model.graph.initializers.values() if v.const_value is not None)
    ir.save(graph.model, folder / MODEL, external_data=DATA if size > EXTERNAL else None)


def _program(call: Call, flat: nn.Module) -> ExportedProgram:
    shapes = tuple({i: Dim.AUTO for i, size in enumerate(x.shape) if size > 1} for x in call.leaves)
    try:
        with _quiet():
            return torch.export.export(flat, call.leaves, dynamic_shapes=(shapes,), strict=False)
    except Exception as e:
        raise CaptureError(
            "torch.export could not capture the model",
            where=type(call.flat.m).__name__,
            found=f"{type(e).__name__}: {_first_line(e)}",
            do="gatecc.inspect says which submodules can be captured; write data-dependent code with torch.where",
        ) from e


def _convert(program: ExportedProgram, call: Call, opset: int) -> ir.Model:
    names: dict[str, Any] = {"input_names": list(call.inputs), "output_names": list(call.outputs)}
    try:
        with _quiet():
            made = torch.onnx.export(program, dynamo=True, opset_version=opset, verbose=False, **names)
    except Exception as e:
        raise ExportError(
            "torch.onnx cannot write this model",
            where=type(call.flat.m).__name__,
            found=f"{type(e).__name__}: {_first_line(e.__cause__ or e)}",
            do="the named operator has no ONNX form yet: select sites or gates without it",
        ) from e
    assert made is not None
    return made.model


def _clean(model: ir.Model, dims: Dims) -> None:
    """Drop traces of the machine, name dims and weights as the model does."""
    graph = model.graph
    model.doc_string = graph.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        if name.startswith("m."):
            del graph.initializers[name]
            value.name = name.removeprefix("m.")
            graph.initializers.add(value)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _clean_value(value, dims)
    for value in (*graph.inputs, *graph.initializers.values()):
        _clean_value(value, dims)


def _clean_value(value: ir.Value, dims: Dims) -> None:
    import onnx_ir as ir

    value.metadata_props.clear()
    value.doc_string = None
    if value.shape is not None:
        value.shape = ir.Shape([d if isinstance(d, int) else dims.rename(str(d.value)) for d in value.shape])


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:300] if lines else ""


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
