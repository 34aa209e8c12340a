"""Translations: torch.onnx's table of operators, made once per opset instead of once per export.

It has a thousand rows, and looking up the operator of each takes half a second: most of the export of a small model.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.onnx._internal.exporter import _registration as registration

_LIBRARIES = ("quantized_decomposed::", "torchvision::")
_MADE: Any = vars(registration.ONNXRegistry)["from_torchlib"]


@cache
def _table(opset: int, libraries: int) -> Any:
    del libraries
    return _MADE.__func__(registration.ONNXRegistry, opset_version=opset)


def _operators_of_libraries() -> int:
    """How many operators are loaded of libraries that torch.onnx knows: a table made before them lacks their rows."""
    return sum(name.startswith(_LIBRARIES) for name in torch._C._dispatch_get_all_op_names())


def _copy(opset_version: int) -> Any:
    """A table of one's own, for an export adds its translations to it."""
    made, known = registration.ONNXRegistry(), _table(opset_version, _operators_of_libraries())
    made._opset_version = known._opset_version
    made.functions = {target: list(rows) for target, rows in known.functions.items()}
    return made


@contextmanager
def known_translations() -> Generator[None]:
    """torch.onnx copies its table meanwhile."""
    registration.ONNXRegistry.from_torchlib = staticmethod(_copy)  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        registration.ONNXRegistry.from_torchlib = _MADE
