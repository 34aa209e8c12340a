"""Which checks (docs/checks.md) a recipe passes: those of its cases, and those that its test file shows."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# What a call in a recipe's test file shows (tests/recipes/checks.py).
CHECKS = {
    "zoo": ("identity", "gradient", "reversible"),
    "agree": ("identity",),
    "causal": ("causality",),
    "cost": ("cost",),
    "gradients": ("gradient",),
    "exported": ("export",),
    "export": ("export",),
    "reverted": ("reversible",),
}
WORDS = {
    "identity": "as it starts, the model computes what it did before",
    "causality": "no output depends on later tokens",
    "cost": "the report counts the operations that run",
    "gradient": "every new parameter that trains has a gradient that is finite and not zero, frozen ones have none",
    "export": "ONNX, or an exported program, computes the same",
    "state": "prefill and single steps are the full forward",
    "reversible": "reverting restores state and outputs bitwise",
}


def checked(info: Any) -> list[str]:
    """The words of the checks that a recipe passes, in the order of the page that defines them."""
    shown = {check for case in info.cases for check in case.checks}
    if (file := test_file(info)).exists():
        shown |= {word for call in calls(ast.parse(file.read_text())) for word in CHECKS.get(call, ())}
    return [word for word in WORDS if word in shown]


def test_file(info: Any) -> Path:
    """The tests of the file that a recipe is in."""
    return ROOT / "tests" / "recipes" / f"test_{info.builder.__module__.rpartition('.')[2]}.py"


def calls(tree: ast.AST) -> Iterator[str]:
    """Names of the functions that are called, unless the result is said to be false; "export" for an option of it."""
    denied = {id(n.operand) for n in ast.walk(tree) if isinstance(n, ast.UnaryOp) and isinstance(n.op, ast.Not)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and id(node) not in denied:
            yield node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            yield from (k.arg for k in node.keywords if k.arg == "export")
