"""Dataclasses to JSON and back, guided by their annotations. Strict JSON: NaN and infinities become strings."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def encode(value: Any) -> Any:
    """A value of dataclasses, lists, tuples, mappings and scalars as what ``json.dumps(allow_nan=False)`` accepts."""
    if is_dataclass(value):
        return {field.name: encode(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): encode(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def decode(kind: Any, value: Any) -> Any:
    """The inverse of ``encode`` for a value annotated as ``kind``.

    Raises TypeError or ValueError if the value is not of that kind. Unknown fields are an error: they would be lost.
    """
    if is_dataclass(kind):
        return _decode_dataclass(kind, value)
    head, args = get_origin(kind) or kind, get_args(kind)
    if head in (Union, types.UnionType):
        return _decode_union(args, value)
    if head in (list, tuple):
        return head(decode(args[0], item) for item in _expect(value, list))
    if head in (dict, Mapping):
        return {key: decode(args[1], item) for key, item in _expect(value, dict).items()}
    if head is Literal:
        return _expect_one_of(value, args)
    if head is float and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        return float(value)
    return _expect(value, head)


def _decode_dataclass(kind: Any, value: Any) -> Any:
    hints = get_type_hints(kind)
    unknown = sorted(set(_expect(value, dict)) - {field.name for field in fields(kind)})
    if unknown:
        raise ValueError(f"{kind.__name__} has no field {unknown[0]!r}")
    return kind(**{name: decode(hints[name], item) for name, item in value.items()})


def _decode_union(args: tuple[Any, ...], value: Any) -> Any:
    if value is None and type(None) in args:
        return None
    (kind,) = (arg for arg in args if arg is not type(None))
    return decode(kind, value)


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"expected {kind.__name__}, found {value!r}")
    return value


def _expect_one_of(value: Any, choices: tuple[Any, ...]) -> Any:
    if value not in choices:
        raise ValueError(f"expected one of {choices}, found {value!r}")
    return value
