"""export: a model as a folder with model.onnx, compared with torch before anything is written."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatecc.analysis import Inputs, check_model, evaluation
from gatecc.capture.adapters import adapted
from gatecc.capture.shield import random_states_kept, shielded
from gatecc.capture.signature import OpaqueArgumentError, map_tensors, split_inputs
from gatecc.codegen.onnx.build import DATA, IR_VERSION, MODEL, Graph, build, write
from gatecc.codegen.onnx.leaves import Call, flat_call
from gatecc.codegen.onnx.packages import EXPORT, RUNTIME, need, versions
from gatecc.codegen.onnx.runtime import Session, check, check_dtypes
from gatecc.errors import ArgumentError, ExampleInputsError, ExportError
from gatecc.scope.family import difference
from gatecc.scope.recurrences import recurrences
from gatecc.scope.whole import Whole, mixes
from gatecc.transform import history

MANIFEST = "gatecc.json"
OPSETS = range(18, 26)  # torch.onnx writes invalid files for 26
TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 2e-2}


@dataclass(frozen=True)
class Compared:
    """One comparison with torch. ``error`` is max|torch - onnx| / max(1, max|torch|) over all outputs."""

    sizes: dict[str, int]
    error: float


@dataclass(frozen=True)
class Exported:
    """What was written. Shapes hold numbers, and names or expressions of names for the sizes that are free."""

    folder: Path
    files: dict[str, str]  # name -> SHA-256
    opset: int
    ir_version: int
    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    operators: dict[str, int]
    compared: tuple[Compared, ...]
    notes: tuple[str, ...] = ()

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the free dimensions."""
        return tuple(dict.fromkeys(d for shape in self.inputs.values() for d in shape if isinstance(d, str)))


@shielded
def export(
    model: nn.Module,
    folder: str | os.PathLike[str],
    example_inputs: Inputs,
    *,
    opset: int = 24,
    verify: bool = True,
) -> Exported:
    """Write ``model.onnx`` and a manifest ``gatecc.json`` to ``folder``; batch, length and the like stay free.

    The graph is that of the model in eval mode without gradients and caches. It passes ONNX's checker and is compared
    with torch in ONNX Runtime at batch 1 and 3 and two lengths; if that fails, nothing is written. ``verify=False``
    leaves the comparison out, and with it the need for ONNX Runtime. Weights beyond 1.5 GiB go to ``model.onnx.data``.

    ``example_inputs``: a tuple is positional, a dict is keyword arguments, ``(tuple, dict)`` is both.
    Raises MissingPackageError, ExampleInputsError, UnsupportedModelError, CaptureError, ExportError.
    """
    need(*EXPORT, *(RUNTIME if verify else ()))
    if opset not in OPSETS:
        raise ArgumentError("this opset cannot be written", found=str(opset), expected="18 to 25; 24 is best tried")
    args, kwargs = split_inputs(example_inputs)
    check_model(model)
    if verify:
        check_dtypes([*model.parameters(), *model.buffers()])
    notes: list[str] = []
    with evaluation(model), adapted(model), torch.no_grad(), random_states_kept():
        call = _call(model, args, kwargs, notes)
        with recurrences(model):
            graph = build(call, opset, _metadata(model), _said(call))
        with tempfile.TemporaryDirectory(dir=_parent(folder), prefix=".gatecc-") as temporary:
            made = Path(temporary) / "made"
            made.mkdir()
            write(graph, made)
            check(made / MODEL)
            compared = _compare(call, graph, made / MODEL, notes) if verify else []
            result = _describe(Path(folder), made, graph, compared, notes if verify else [*notes, "not compared"])
            _write_manifest(made / MANIFEST, model, result)
            _move(made, Path(folder))
    return result


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


def _said(call: Call) -> Whole | None:
    """The call as one graph, where the model's own parts cannot be exported each by itself."""
    if not mixes(call.flat.m):
        return None
    args, kwargs = call.arguments(call.leaves)
    return Whole(call.flat.m, args, kwargs)


def _per_sample(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Whether an output for two samples is like that for one, with twice or as many rows."""
    return (
        one.dim() == two.dim()
        and one.shape[1:] == two.shape[1:]
        and two.shape[:1]
        in (
            one.shape[:1],
            torch.Size([2 * n for n in one.shape[:1]]),
        )
    )


def _doubled(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x, x]) if x.dim() and x.shape[0] == 1 else x


# --- comparison -------------------------------------------------------------------------------------------------------


def _compare(call: Call, graph: Graph, path: Path, notes: list[str]) -> list[Compared]:
    session = Session(path)
    wanted, candidates = graph.dims.variants(call.leaves)
    sizes = [s for s in wanted if _runs(call, graph, s)]
    notes.extend(f"not compared at batch {s['batch']}: the model does not run there" for s in wanted if s not in sizes)
    second = next((c for c in candidates if _runs(call, graph, c)), None)
    if second is not None:
        sizes = [*sizes, *({**second, **{k: s[k] for k in s if k == "batch"}} for s in sizes)]
    elif set(graph.dims.names.values()) - {"batch"}:
        notes.append("compared at one length: the model does not run at any other that was tried")
    return [_compare_at(call, graph, session, s) for s in sizes or [graph.dims.sizes(call.leaves)]]


def _runs(call: Call, graph: Graph, sizes: dict[str, int]) -> bool:
    leaves = graph.dims.resized(call.leaves, sizes)
    if not graph.accepts(leaves):
        return False
    try:
        call.flat(*leaves)
    except Exception:
        return False
    return True


def _compare_at(call: Call, graph: Graph, session: Session, sizes: dict[str, int]) -> Compared:
    leaves = graph.dims.resized(call.leaves, sizes)
    torch.manual_seed(0)
    expected = [x.cpu() for x in call.flat(*leaves)]
    found = session.run(call.inputs, leaves)
    worst = 0.0
    for name, x, y in zip(call.outputs, expected, found, strict=True):
        error = difference(x, y) if x.dtype == y.dtype else float("inf")
        tolerance = TOLERANCE.get(x.dtype, 0.0)
        if not error <= tolerance:
            raise ExportError(
                "the ONNX graph does not compute what the model does",
                where=f"{name} at " + (", ".join(f"{k} {v}" for k, v in sizes.items()) or "the example's sizes"),
                found=f"{tuple(y.shape)} {y.dtype}, difference {error:.3g} of max(1, max|{name}|)",
                expected=f"{tuple(x.shape)} {x.dtype}, at most {tolerance:.3g}",
                do="a model that draws random numbers in eval mode cannot be compared: verify=False writes it",
            )
        worst = max(worst, error)
    return Compared(sizes, worst)


# --- files ------------------------------------------------------------------------------------------------------------


def _metadata(model: nn.Module) -> dict[str, str]:
    recipes = ", ".join(step.recipe.name for step in history(model))
    return {"gatecc.version": versions("gatecc").get("gatecc", ""), **({"gatecc.recipe": recipes} if recipes else {})}


def _describe(folder: Path, made: Path, graph: Graph, compared: Sequence[Compared], notes: Sequence[str]) -> Exported:
    return Exported(
        folder=folder,
        files={p.name: _digest(p) for p in sorted(made.iterdir())},
        opset=graph.model.opset_imports[""],
        ir_version=IR_VERSION,
        inputs=graph.shapes(graph.model.graph.inputs),
        outputs=graph.shapes(graph.model.graph.outputs),
        operators=graph.operators,
        compared=tuple(compared),
        notes=tuple(notes),
    )


def _write_manifest(path: Path, model: nn.Module, result: Exported) -> None:
    """No date and no place: the same model gives the same bytes."""
    data = {k: v for k, v in asdict(result).items() if k != "folder"}
    steps = [
        {"recipe": s.recipe.name, "citation": s.recipe.citation, "sites": [r.site for r in s.report.rewrites]}
        for s in history(model)
    ]
    known = versions("gatecc", "torch", *EXPORT, *RUNTIME)
    head = {"format": 1, "model": type(model).__qualname__, "dims": list(result.dims)}
    path.write_text(json.dumps({**head, **data, "steps": steps, "versions": known}, indent=1) + "\n")


def _parent(folder: str | os.PathLike[str]) -> Path:
    """Where to build: on the same file system as the folder. Missing parents are made."""
    parent = Path(folder).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError("the folder cannot be made", where=str(folder), found=str(e)) from e
    return parent


def _move(made: Path, folder: Path) -> None:
    """Put the finished files in place: the folder as a whole, or into one that exists, the graph after its weights."""
    try:
        if not folder.exists():
            os.replace(made, folder)
            return
        for name in (DATA, MODEL, MANIFEST):
            if (made / name).exists():
                os.replace(made / name, folder / name)
            else:
                (folder / name).unlink(missing_ok=True)
    except OSError as e:
        raise ExportError("the files cannot be written", where=str(folder), found=str(e)) from e


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
