"""bfloat16 in Triton's interpreter, which holds it as integers: it multiplies bit patterns, and cuts off for rounding.

Here values are widened to float32, computed, and rounded to the nearest, ties to even, as GPUs do.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


@contextmanager
def exact_bfloat16() -> Generator[None]:
    """Let the interpreter compute in bfloat16 as a GPU does."""
    builder: Any = interpreter.InterpreterBuilder
    cast, convert, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    unary, binary = builder.unary_op, builder.binary_op

    def _cast(self: Any, x: Any, target: Any) -> Any:
        narrow, given = target.scalar == tl.bfloat16, x.dtype.scalar == tl.bfloat16
        if given == narrow:
            return cast(self, x, target)
        return _narrow(x.data.astype(np.float32)) if narrow else cast(self, _wide(x), target)

    def _convert(self: Any, x: Any, target: Any, rounding: Any) -> Any:
        exact = target.scalar == tl.bfloat16 and x.dtype.scalar in (tl.float16, tl.float32, tl.float64)
        return _cast(self, x, target) if exact else convert(self, x, target, rounding)

    def _unary(self: Any, x: Any, function: Any) -> Any:
        return _narrow(function(_wide(x).data)) if _is(x) else unary(self, x, function)

    def _binary(self: Any, x: Any, y: Any, function: Any) -> Any:
        if not (_is(x) and _is(y)):
            return binary(self, x, y, function)
        found = function(_wide(x).data, _wide(y).data)
        return interpreter.TensorHandle(found, tl.int1) if found.dtype == bool else _narrow(found)

    def _dot(self: Any, x: Any, y: Any, *rest: Any) -> Any:
        return dot(self, _wide(x), _wide(y), *rest)

    def _constant(self: Any, value: float) -> Any:
        return _narrow(np.array([value]))

    with (
        patch.object(builder, "get_bf16", _constant, create=True),
        patch.multiple(
            builder, cast_impl=_cast, create_fp_to_fp=_convert, unary_op=_unary, binary_op=_binary, create_dot=_dot
        ),
        patch.object(interpreter.ReduceOps, "apply_impl", _widened(interpreter.ReduceOps.apply_impl)),
        patch.object(interpreter.ScanOps, "apply_impl", _widened(interpreter.ScanOps.apply_impl)),
    ):
        yield


def _widened(usual: Any) -> Any:
    """A reduction or scan, which a GPU rounds at each step and this once."""

    def _apply(self: Any, given: Any) -> Any:
        narrow = [_is(x) for x in given]
        if not any(narrow):
            return usual(self, given)
        found = usual(self, tuple(_as(x, _wide(x.handle)) for x in given))
        parts = found if isinstance(found, (list, tuple)) else [found]
        return tuple(_as(x, _narrow(x.handle.data)) if n else x for x, n in zip(parts, narrow, strict=False))

    return _apply


def _as(x: Any, handle: Any) -> Any:
    """A tensor of the language with other numbers."""
    kind = handle.dtype.scalar
    return tl.core.tensor(handle, tl.block_type(kind, list(x.shape)) if x.type.is_block() else kind)


def _is(x: Any) -> bool:
    return x.dtype.scalar == tl.bfloat16


def _wide(x: Any) -> Any:
    """bfloat16 as float32; anything else as it is."""
    if not _is(x):
        return x
    bits = np.ascontiguousarray(x.data).astype(np.uint32) << 16
    return interpreter.TensorHandle(bits.view(np.float32), tl.float32)


def _narrow(x: Any) -> Any:
    """float32 as the bits of bfloat16."""
    x = np.ascontiguousarray(x, dtype=np.float32)
    bits = x.view(np.uint32)
    rounded = ((bits + ((bits >> 16) & 1) + np.uint32(0x7FFF)) >> 16).astype(np.uint16)
    return interpreter.TensorHandle(np.where(np.isnan(x), np.uint16(0x7FC0), rounded), tl.bfloat16)
