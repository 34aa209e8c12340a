"""Translations: torch.onnx's table of operators, made once per opset instead of once per export.

It has a thousand rows, and looking up the operator of each takes half a second: most of the export of a small model.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch.onnx._internal.exporter import _registration as registration

_MADE: Any = vars(registration.ONNXRegistry)["from_torchlib"]


@cache
def _table(opset: int) -> Any:
    return _MADE.__func__(registration.ONNXRegistry, opset_version=opset)


def _copy(opset_version: int) -> Any:
    """A table of one's own, for an export adds its translations to it."""
    made, known = registration.ONNXRegistry(), _table(opset_version)
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
