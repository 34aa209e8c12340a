"""What keeps the house readable, enforced: ``python -m tools.house``.

No two files of the package import each other, not even by way of others; no row of the layer table but that of the
command line has more than three peers; no file of the repository has more than 400 lines; and names that were given up
for better ones do not come back. The order of the layers itself is in tools/layers.py.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import networkx as nx

from tools import layers

LONGEST = 400  # lines of a file
PEERS = 3  # layers of one row that may import each other
FOLDERS = ("gatecc", "tests", "tools", "examples", "benchmarks")

# Words of file, class and function names that were given up, and what is said instead (design.md, section 9).
RETIRED = {
    "ways": "transfer",
    "weighing": "deferred_softmax",
    "said": "export_module, replacement",
    "bent": "activation",
    "worked": "what it did",
    "recurrence": "state_space, rnn, or transformers_loops",
    "recurrences": "transformers_loops",
    "recurrent": "rnn",
}
# Names that are right elsewhere, but not as the name of a file or class.
RETIRED_WHOLE = {"kinds": "dependence", "mixers": "scan, for step rules; a package of mixers is one"}
ALLOWED = ("gatecc/passes/mix/mixers",)
# Phrases of comments and docstrings that are no plain English.
PHRASES = {"how-manyth": "index", "is said by": "is replaced by", "are said by": "are replaced by"}


def circles(root: Path = layers.ROOT) -> list[str]:
    """Files of the package that import each other, wherever their imports stand."""
    return [
        "files import each other: " + ", ".join(f"{name.replace('.', '/')}.py" for name in sorted(component))
        for component in nx.strongly_connected_components(imports(root))
        if len(component) > 1
    ]


def imports(root: Path) -> nx.DiGraph[str]:
    """An edge from each file of the package to those that it imports."""
    names = {_module(path.relative_to(root)): path for path in (root / layers.PACKAGE).rglob("*.py")}
    graph: nx.DiGraph[str] = nx.DiGraph()
    for name, path in names.items():
        parts = path.relative_to(root).with_suffix("").parts
        for target in layers.imported(path.read_text(encoding="utf-8"), parts):
            found = target if target in names else target.rpartition(".")[0]
            if found in names and found != name:
                graph.add_edge(name, found)
    return graph


def peers(table: tuple[layers.Layer, ...] = layers.LAYERS) -> list[str]:
    """Rows of the layer table in which too many layers may import each other."""
    return [
        f"a row of the layer table has {len(row.names)} peers: {', '.join(row.names)}; at most {PEERS}"
        for row in table
        if row.peers and len(row.names) > PEERS
    ]


def long_files(root: Path = layers.ROOT) -> list[str]:
    """Files with more lines than one reads at once."""
    counted = ((path, path.read_text(encoding="utf-8").count("\n")) for path in _files(root))
    return [f"{_place(path, root)}: {n} lines; at most {LONGEST}" for path, n in counted if n > LONGEST]


def retired_names(root: Path = layers.ROOT) -> list[str]:
    """Files, classes, functions and phrases by names that were given up."""
    found: list[str] = []
    for path in _files(root):
        place, text = _place(path, root), path.read_text(encoding="utf-8")
        if path.name == Path(__file__).name or path.name == "test_house.py":
            continue
        for line, name in _names(place, text):
            if (better := _better(name)) and not place.startswith(ALLOWED):
                found.append(f"{place}:{line}: `{name}` is a retired name; say {better}")
        for number, row in enumerate(text.splitlines(), 1):
            found += [f"{place}:{number}: `{old}`; say {new}" for old, new in PHRASES.items() if old in row]
    return found


def _names(place: str, text: str) -> Iterator[tuple[int, str]]:
    """The name of a file, and those of its classes and functions."""
    yield 1, Path(place).stem
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name


def _better(name: str) -> str:
    if name.startswith("test_"):  # a sentence, not a name
        return ""
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    lower = [word.lower() for word in words]
    whole = RETIRED_WHOLE.get("_".join(lower), "")
    return next((RETIRED[word] for word in lower if word in RETIRED), whole)


def _files(root: Path) -> list[Path]:
    return sorted(path for folder in FOLDERS for path in (root / folder).rglob("*.py"))


def _place(path: Path, root: Path) -> str:
    return path.relative_to(root).as_posix()


def _module(path: Path) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def main() -> int:
    found = [*circles(), *peers(), *long_files(), *retired_names()]
    print(*found, sep="\n", end="\n" if found else "")
    if found:
        return 1
    print("house: no circles, no long files, no retired names")
    return 0


if __name__ == "__main__":
    sys.exit(main())
