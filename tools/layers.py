"""The order of gatecc's layers, enforced on every import: ``python tools/layers.py``.

A layer imports only from layers below it, so each can be read, tested and replaced without those above. Imports are
read from the syntax tree, wherever they stand: at the top, inside a function, under TYPE_CHECKING, relative, or through
``importlib.import_module`` with a literal name. What holds for every file alike is ruff's banned-api in pyproject.toml.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

PACKAGE = "gatecc"
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Layer:
    """Packages or modules of one height. They do not import each other, unless they are ``peers``."""

    names: tuple[str, ...]
    peers: bool = False


# Lowest first. From `decoder` to `integrations` they are the doors: what a user calls.
LAYERS = (
    Layer(("errors",)),
    Layer(("ir",)),
    Layer(("capture",)),
    Layer(("codegen",)),
    Layer(("ops",)),
    Layer(("passes",)),
    Layer(("pipeline", "report")),
    Layer(("recipes", "parallel")),
    Layer(("train",)),
    Layer(("scope",)),
    Layer(("engine",)),
    Layer(("decoder", "diagnose", "backend")),
    Layer(("transform", "state_space", "cost")),
    Layer(("checkpoint", "export", "adapters", "handoff", "specialise")),
    Layer(("integrations", "checks", "onnx")),
    Layer(("__init__",)),
    Layer(("cli", "__main__"), peers=True),
)
HEIGHT = {name: height for height, layer in enumerate(LAYERS) for name in layer.names}

# Libraries that a layer does not know, and who does.
FOREIGN = {
    "torch.onnx": "gatecc.codegen.onnx",
    "onnx": "gatecc.codegen.onnx",
    "onnx_ir": "gatecc.codegen.onnx",
    "onnxscript": "gatecc.codegen.onnx",
    "onnxruntime": "gatecc.codegen.onnx",
    "triton": "an operator of gatecc.ops",
    "gatecc.codegen": "an operator of gatecc.ops",
}
TARGET_FREE = ("errors", "ir", "capture", "passes")
DYNAMIC = ("importlib.import_module", "import_module", "__import__")


@dataclass(frozen=True)
class Violation:
    """One import that the order forbids. It prints as ``file:line: what it is; what to do instead``."""

    file: str
    line: int
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.message}"


def violations(source: str, file: str, modules: frozenset[str] = frozenset()) -> list[Violation]:
    """The forbidden imports of one file.

    Args:
        source: the text of the file.
        file: its path relative to the repository root, ``gatecc/passes/gate.py``; it decides the layer.
        modules: names directly under ``gatecc`` that are modules. In ``from gatecc import name`` any other name is a
            public function of ``gatecc/__init__.py``.
    """
    parts = Path(file).with_suffix("").parts
    layer = parts[1]
    if layer not in HEIGHT:
        return [Violation(file, 1, f"`{layer}` has no layer: give it one in LAYERS of tools/layers.py")]
    found: list[Violation] = []
    for line, target in _imports(ast.parse(source), parts, modules | set(HEIGHT)):
        message = _judge(layer, target)
        if message is not None:
            found.append(Violation(file, line, message))
    return found


def check(root: Path = ROOT) -> list[Violation]:
    """The forbidden imports of every file under ``root/gatecc``."""
    modules = frozenset(path.stem for path in (root / PACKAGE).iterdir() if path.is_dir() or path.suffix == ".py")
    found: list[Violation] = []
    for path in sorted((root / PACKAGE).rglob("*.py")):
        found += violations(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix(), modules)
    return found


def imported(source: str, parts: tuple[str, ...]) -> list[str]:
    """The dotted names that a file imports; ``parts`` is its path without suffix, (gatecc, passes, gate)."""
    return [target for _, target in _imports(ast.parse(source), parts, frozenset(HEIGHT))]


def _judge(layer: str, target: str) -> str | None:
    """Why ``layer`` may not import ``target``, or None if it may."""
    foreign = next((name for name in FOREIGN if _within(target, name)), None)
    if foreign is not None and layer in TARGET_FREE:
        return f"{layer} imports {foreign}: {layer} does not know a target; put this into {FOREIGN[foreign]}"
    if not _within(target, PACKAGE):
        return None
    other = target.split(".")[1] if "." in target else "__init__"
    if other == layer:
        return None
    if other not in HEIGHT:
        return f"{layer} imports {target}, which has no layer: give it one in LAYERS of tools/layers.py"
    return _compare(layer, other)


def _compare(layer: str, other: str) -> str | None:
    mine, theirs = HEIGHT[layer], HEIGHT[other]
    if theirs < mine or (theirs == mine and LAYERS[mine].peers):
        return None
    if other == "__init__":
        return f"{layer} imports the public surface: import the module that defines the name, gatecc.<layer>..."
    shared = ", ".join(name for below in LAYERS[:mine] for name in below.names)
    relation = "beside" if theirs == mine else "above"
    advice = f"move what both need into a layer below ({shared})" if shared else "nothing is below it"
    return f"{layer} imports {other}, which stands {relation} it: {advice}, or hand it in as an argument"


def _imports(tree: ast.AST, parts: tuple[str, ...], modules: frozenset[str]) -> Iterator[tuple[int, str]]:
    """Line and absolute dotted name of everything that ``tree`` imports, or reaches as an attribute of an import."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, parts)
            yield from ((node.lineno, _member(base, alias.name, modules)) for alias in node.names)
        elif isinstance(node, ast.Call) and _dotted(node.func) in DYNAMIC:
            yield from ((node.lineno, name) for name in _literals(node.args[:1]))
        elif isinstance(node, ast.Attribute) and _dotted(node) in FOREIGN:
            yield node.lineno, _dotted(node)


def _absolute(node: ast.ImportFrom, parts: tuple[str, ...]) -> str:
    """The module that a ``from`` names; ``parts`` is the file's path, (gatecc, passes, gate) or (..., __init__)."""
    if node.level == 0:
        return node.module or ""
    package = parts[: len(parts) - node.level]
    return ".".join((*package, node.module) if node.module else package)


def _member(base: str, name: str, modules: frozenset[str]) -> str:
    """``from torch import onnx`` reaches torch.onnx; ``from gatecc import inspect`` only the public surface."""
    if base == PACKAGE and name not in modules:
        return base
    return f"{base}.{name}" if base else name


def _literals(nodes: list[ast.expr]) -> list[str]:
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def _dotted(node: ast.expr) -> str:
    """``a.b.c`` as text; empty for anything that is not a chain of names."""
    if isinstance(node, ast.Name):
        return node.id
    if not isinstance(node, ast.Attribute):
        return ""
    base = _dotted(node.value)
    return f"{base}.{node.attr}" if base else ""


def _within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def main() -> int:
    found = check()
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        return 1
    print(f"layers: {len(list((ROOT / PACKAGE).rglob('*.py')))} files in order")
    return 0


if __name__ == "__main__":
    sys.exit(main())
