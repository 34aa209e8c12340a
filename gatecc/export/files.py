"""What an export writes: the record of it, the manifest, and files that are moved into place as a whole."""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from torch import nn

from gatecc.codegen.onnx.build import DATA, IR_VERSION, MODEL, Graph
from gatecc.codegen.onnx.functions import calls
from gatecc.codegen.onnx.packages import EXPORT, RUNTIME, versions
from gatecc.errors import ExportError
from gatecc.export.compare import Compared
from gatecc.export.decode import DECODE, Decode
from gatecc.export.encoder import ENCODER
from gatecc.export.genai import CONFIG
from gatecc.export.quantize import Quantized
from gatecc.transform import history

MANIFEST = "gatecc.json"
_OLD_OPSET, _OLD_RUNTIME = 21, "1.18"  # the first release with IR version 10


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
    lowered: dict[str, int] = field(default_factory=dict[str, int])
    """How many places each lowering put in its ONNX form: ``{"attention: GroupQueryAttention": 6}``."""
    kept: dict[str, int] = field(default_factory=dict[str, int])
    """What was left as the model spells it, how often, and why: ``{"attention: causal+padding: ...": 6}``."""
    decode: Decode | None = None
    quantized: Quantized | None = None
    minimal_runtime: str | None = None
    """The oldest ONNX Runtime that is known to run the files: the one they were compared in, or 1.18 where they hold
    operators of the standard up to opset 21 alone. None if nobody ran them."""

    functions: dict[str, int] = field(default_factory=dict[str, int])
    """How often each function of ``functions=True`` is called in model.onnx, also by others. ``operators`` counts the
    nodes that runtimes put in their place."""

    @property
    def dims(self) -> tuple[str, ...]:
        """The names of the free dimensions."""
        return tuple(dict.fromkeys(d for shape in self.inputs.values() for d in shape if isinstance(d, str)))


def metadata(model: nn.Module) -> dict[str, str]:
    """What the graph itself says about where it comes from."""
    recipes = ", ".join(step.recipe.name for step in history(model))
    return {"gatecc.version": versions("gatecc").get("gatecc", ""), **({"gatecc.recipe": recipes} if recipes else {})}


def describe(
    folder: Path,
    made: Path,
    graph: Graph,
    compared: Sequence[Compared],
    notes: Sequence[str],
    decode: Decode | None = None,
) -> Exported:
    """The record of the files in ``made``, which are to be moved to ``folder``."""
    return Exported(
        folder=folder,
        files={p.relative_to(made).as_posix(): _digest(p) for p in sorted(made.rglob("*")) if p.is_file()},
        opset=graph.model.opset_imports[""],
        ir_version=IR_VERSION,
        inputs=graph.shapes(graph.model.graph.inputs),
        outputs=graph.shapes(graph.model.graph.outputs),
        operators=graph.operators,
        compared=tuple(compared),
        notes=tuple(notes),
        lowered=_counted(f"{o.lowering}: {o.became}" for o in graph.outcomes if o.became),
        kept=_counted(f"{o.lowering}: {o.found}: {o.reason}" for o in graph.outcomes if not o.became),
        decode=decode,
        minimal_runtime=_minimal_runtime(graph, any(not c.reference for c in compared)),
        functions=calls(graph.written) if graph.functions else {},
    )


def _minimal_runtime(graph: Graph, ran: bool) -> str | None:
    if graph.model.opset_imports[""] <= _OLD_OPSET and not any("::" in op for op in graph.operators):
        return _OLD_RUNTIME
    found = versions(*RUNTIME) if ran else {}
    return next(iter(found.values()), None)


def _counted(texts: Iterable[str]) -> dict[str, int]:
    return dict(sorted(Counter(texts).items()))


def write_manifest(path: Path, model: nn.Module, result: Exported) -> None:
    """No date and no place: the same model gives the same bytes."""
    data = {k: v for k, v in asdict(result).items() if k != "folder"}
    steps = [
        {"recipe": s.recipe.name, "citation": s.recipe.citation, "sites": [r.site for r in s.report.rewrites]}
        for s in history(model)
    ]
    known = made_by()
    head = {"format": 1, "model": type(model).__qualname__, "dims": list(result.dims)}
    path.write_text(json.dumps({**head, **data, "steps": steps, "versions": known}, indent=1) + "\n")


def made_by() -> dict[str, str]:
    """The versions of what writes and runs the files."""
    return versions("gatecc", "torch", *EXPORT, *RUNTIME)


def parent(folder: str | os.PathLike[str]) -> Path:
    """Where to build: on the same file system as the folder. Missing parents are made."""
    parent = Path(folder).absolute().parent
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ExportError("the folder cannot be made", where=str(folder), found=str(e)) from e
    return parent


def move(made: Path, folder: Path) -> None:
    """Put the finished files in place: the folder as a whole, or into one that exists, the graph after its weights."""
    try:
        if not folder.exists():
            os.replace(made, folder)
            return
        written = [p.relative_to(made) for p in made.rglob("*") if p.is_file()]
        for path in sorted(written, key=_turn):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            os.replace(made / path, folder / path)
        for name in (DATA, MODEL, ENCODER, DECODE, CONFIG):
            if Path(name) not in written:
                (folder / name).unlink(missing_ok=True)
    except OSError as e:
        raise ExportError("the files cannot be written", where=str(folder), found=str(e)) from e


def _turn(path: Path) -> tuple[int, str]:
    """When a file is put in place: weights before the graphs that read them, the manifest after all."""
    order = (DATA, MODEL, ENCODER, DECODE)
    name = str(path)
    return (order.index(name) if name in order else len(order) + (name == MANIFEST)), name


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
