"""Sizes: comparing and evaluating the symbolic sizes of a program."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from math import prod
from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols, optimization_hint

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


def on_example(size: Size) -> int | None:
    """A size on the example inputs, where it is known."""
    known = size if isinstance(size, int) else size.node.hint
    return None if known is None else int(known)


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
    if result.free_symbols and isinstance(size, torch.SymFloat) and not free_unbacked_symbols(size):
        return float(size)  # a number that Dynamo hands over as an input: a guard pins it to that of this call
    if result.free_symbols:
        raise UnknownSizeError(f"the size {result} depends on the data")
    if isinstance(size, torch.SymBool):
        return bool(result)
    return int(result) if isinstance(size, torch.SymInt) else float(result)


def example_sizes(program: Program) -> dict[sympy.Symbol, int]:
    """The value of every symbol on the example inputs."""
    known: dict[sympy.Symbol, int] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        held = node.meta.get("val")
        if isinstance(held, torch.SymInt) and isinstance(expression(held), sympy.Symbol):
            known[expression(held)] = optimization_hint(held)  # a number that a graph takes beside its tensors
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


AXES = {1: "b", 2: "bn", 3: "bnc", 4: "bhnm", 5: "btcyx"}  # what the axes of an input usually count, by its rank
_MORE = "nmkldefijopqrsuvw"  # for further sizes
_WORD = re.compile(r"[A-Za-z_]\w*")


def size_names(graph: fx.Graph) -> dict[str, str]:
    """A letter for each symbolic size of a graph: b for the batch, n for tokens, from the inputs' axes."""
    held = [n.meta.get("val") for n in graph.find_nodes(op="placeholder")]
    inputs: list[tuple[Any, ...]] = [tuple(x.shape) for x in held if isinstance(x, torch.Tensor)]
    names: dict[str, str] = {}
    free = [sum(not isinstance(size, int) for size in shape) for shape in inputs]  # a position table has no batch
    order = sorted(range(len(inputs)), key=lambda i: (len(inputs[i]) not in (2, 3), -free[i]))
    for shape in (inputs[i] for i in order):
        for size, letter in zip(shape, AXES.get(len(shape), ""), strict=False):
            symbol = str(size)
            if symbol in names or not _WORD.fullmatch(symbol):
                continue
            letters = [a for a in (letter, *_MORE) if a not in names.values()]
            names[symbol] = letters[0] if letters else symbol
    return names


def shape_text(shape: Iterable[Size], names: Mapping[str, str]) -> str:
    """A shape as it is written everywhere: ``b n 48``; "scalar" without axes."""
    return " ".join(size_text(size, names) for size in shape) or "scalar"


def size_text(size: Any, names: Mapping[str, str]) -> str:
    """One size: a number, a letter, or an expression of letters without spaces."""
    return renamed(str(size), names).replace(" ", "")


def renamed(text: str, names: Mapping[str, str]) -> str:
    """A text with the names of symbolic sizes in it replaced."""
    return _WORD.sub(lambda word: names.get(word[0], word[0]), text)


def described_shape(node: fx.Node) -> str:
    """The shape of the tensor that a node holds, "" if it holds none."""
    held = node_shape(node)
    return "" if held is None else shape_text(held, size_names(node.graph))


def node_shape(node: fx.Node) -> tuple[Size, ...] | None:
    """The recorded shape of a tensor node, None if it does not hold one tensor."""
    held = node.meta.get("val")
    return tuple(held.shape) if isinstance(held, torch.Tensor) else None
