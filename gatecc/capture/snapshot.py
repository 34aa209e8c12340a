"""Snapshot: what an attribute held when a graph baked it in, in a form that is compared safely and at once.

Constants are kept by type and value, containers by what they hold. Tensors are compared by identity and version, other
objects by identity: never with ``==``, which has no one truth value for tensors, nor for what holds them.
"""

from __future__ import annotations

import enum
import weakref
from typing import Any, cast

import torch

from gatecc.capture.signature import CONSTANTS

_LARGEST = 512  # entries of a container, elements of an array: larger ones count by identity
_FIXED = (*CONSTANTS, type(None), enum.Enum, type, range)


class Same:
    """An object by its identity; it is not kept alive."""

    __slots__ = ("_alive", "_kept")

    def __init__(self, value: object) -> None:
        try:
            self._alive, self._kept = weakref.ref(value), None
        except TypeError:  # an extension type without weak references
            self._alive, self._kept = None, value

    def _value(self) -> object:
        return self._kept if self._alive is None else self._alive()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and (mine := self._value()) is not None and mine is other._value()

    def __hash__(self) -> int:
        return 0


def snapshot(value: Any) -> Any:
    """What is compared. Written so that Dynamo can trace it for constants and containers of them."""
    if isinstance(value, _FIXED):
        return type(value), value if value == value else repr(value)  # NaN
    if isinstance(value, tuple | list) and len(cast("list[Any]", value)) <= _LARGEST:
        return type(cast("object", value)), tuple([snapshot(x) for x in cast("list[Any]", value)])
    if isinstance(value, dict) and len(cast("dict[Any, Any]", value)) <= _LARGEST:
        pairs = cast("dict[Any, Any]", value).items()
        return type(cast("object", value)), tuple([(snapshot(k), snapshot(x)) for k, x in pairs])
    if isinstance(value, torch.Tensor):
        return Same(value), None if value.is_inference() else value._version
    if isinstance(value, set | frozenset) and all(isinstance(x, _FIXED) for x in cast("set[Any]", value)):
        return type(cast("object", value)), frozenset(cast("set[Any]", value))
    return Same(value), _content(value)


def _content(value: Any) -> Any:
    """The elements of a small array of NumPy, which has no version; the size of a large container."""
    if type(value).__module__ == "numpy" and hasattr(value, "tobytes"):
        return value.tobytes() if value.size <= _LARGEST and not value.dtype.hasobject else value.shape
    return len(value) if isinstance(value, tuple | list | dict) else None


def is_fixed(value: Any) -> bool:
    """Whether the same object has the same value for ever."""
    if isinstance(value, tuple):
        return all(is_fixed(x) for x in cast("tuple[Any, ...]", value))
    return isinstance(value, _FIXED)


def holds_constants(value: Any) -> bool:
    """Whether a value is made of constants alone."""
    if isinstance(value, tuple | list):
        return all(holds_constants(x) for x in cast("list[Any]", value))
    if isinstance(value, dict):
        return all(holds_constants(x) for pair in cast("dict[Any, Any]", value).items() for x in pair)
    return isinstance(value, _FIXED)
