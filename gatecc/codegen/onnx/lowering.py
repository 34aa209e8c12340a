"""Lowering: how an operator that torch.onnx does not know is put in its ONNX form."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError


@dataclass(frozen=True)
class Lowering:
    """``form`` takes what the operator takes and computes it with ATen operators and ``torch.onnx.ops.symbolic``.

    ``check`` raises ExportError for a call that the form does not know. ``fixed`` yields the sizes of a call that the
    form writes as attributes of a node, so that they must be numbers. Without a form an operator is there for its
    check.
    """

    form: Callable[..., Any] | None
    check: Callable[[fx.Node], None] = lambda node: None
    fixed: Callable[[fx.Node], Iterable[Any]] = lambda node: ()


def without_form(found: str, do: str) -> Lowering:
    """For an operator that no graph holds: an export with it is refused, by its name, module and line."""

    def check(node: fx.Node) -> None:
        raise ExportError("this operator has no ONNX form", where=place(node), found=found, do=do)

    return Lowering(None, check)


GRADIENT = without_form("a gradient, or what is kept for one", "export the model; what trains it stays in torch")
