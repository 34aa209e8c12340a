"""Sizes: comparing and evaluating the symbolic sizes of a program."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import sympy
import torch
from torch import fx

from gatecc.ir.program import Program

Size = int | torch.SymInt
Sizes = Mapping[sympy.Symbol, int]


class UnknownSizeError(Exception):
    """A size depends on the data, not on the inputs' sizes alone."""


def expression(size: Any) -> Any:
    """The size as a sympy expression, equal for sizes that are always equal."""
    if isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size.node.expr
    return sympy.sympify(size)


def numel(sizes: Iterable[Size]) -> Any:
    """The number of elements of a shape."""
    return prod((expression(size) for size in sizes), start=sympy.Integer(1))


def same(one: Size, other: Size) -> bool:
    """Whether two sizes are equal whatever the inputs' sizes are."""
    return (
        one == other if isinstance(one, int) and isinstance(other, int) else bool(expression(one) == expression(other))
    )


def symbols(size: Any) -> set[sympy.Symbol]:
    """The free symbols of a size."""
    return set() if isinstance(size, int) else {s for s in expression(size).free_symbols if isinstance(s, sympy.Symbol)}


def value(size: Any, sizes: Sizes) -> Any:
    """The size as a Python number; raises UnknownSizeError if a symbol has no value, or the size none at these."""
    if not isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool):
        return size
    try:
        result: Any = sympy.sympify(expression(size).xreplace({s: sympy.Integer(v) for s, v in sizes.items()}))
    except ZeroDivisionError as e:
        raise UnknownSizeError(f"the size {size} divides by zero at {sorted(map(str, sizes.values()))}") from e
    if result.free_symbols:
        raise UnknownSizeError(f"the size {result} depends on the data")
    if isinstance(size, torch.SymBool):
        return bool(result)
    return int(result) if isinstance(size, torch.SymInt) else float(result)


def example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The value of every symbol on the example inputs."""
    known: dict[sympy.Symbol, int] = {}
    for node, tensor in zip(program.placeholders, program.example, strict=True):
        for size, actual in zip(node.meta["val"].shape, tensor.shape, strict=True):
            if isinstance(size, torch.SymInt) and isinstance(expression(size), sympy.Symbol):
                known[expression(size)] = actual
    return known


def upper_bound(size: Any) -> int:
    """The largest value that the capture allows for a size."""
    if isinstance(size, int):
        return size
    bound = size.node.shape_env.bound_sympy(expression(size)).upper
    return int(bound) if bound.is_Integer else 1 << 40


def node_shape(node: fx.Node) -> tuple[Size, ...] | None:
    """The recorded shape of a tensor node, None if it does not hold one tensor."""
    held = node.meta.get("val")
    return tuple(held.shape) if isinstance(held, torch.Tensor) else None
