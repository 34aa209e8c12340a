"""Dims: the sizes that stay free in an exported graph, their names, and inputs of other sizes to compare with."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import SYMPY_INTERP

BATCH, SEQUENCE = "batch", "sequence"
_SYMBOL = re.compile(r"\b[su]\d+\b")
_STEPS = (3, -1, 1, 2, 5, 7, 8, 16, 32)  # tried in turn as the difference of a second length


@dataclass(frozen=True, eq=False)
class Dims:
    """The free sizes. ``shapes[i]`` is that of input i: numbers, and expressions over the symbols in ``names``."""

    names: dict[sympy.Symbol, str]  # several symbols may be one dimension
    shapes: tuple[tuple[Any, ...], ...]
    others: dict[str, str] = field(default_factory=dict[str, str])  # sizes inside the graph that no input has

    @classmethod
    def of(cls, values: Sequence[torch.Tensor], leaves: Sequence[torch.Tensor], inputs: Sequence[str]) -> Dims:
        """Name the symbols of the traced inputs. Axes of one usual name and one size in the example are one dimension.

        torch.export finds that two sizes are equal only where the model compares them, and gathers do not compare.
        """
        shapes = tuple(tuple(_expression(size) for size in value.shape) for value in values)
        names: dict[sympy.Symbol, str] = {}
        sizes: dict[str, int] = {}
        for name, leaf, shape in zip(inputs, leaves, shapes, strict=True):
            for axis, expression in enumerate(shape):
                if isinstance(expression, sympy.Symbol) and expression not in names:
                    usual, size = _usual(name, leaf, axis), leaf.shape[axis]
                    names[expression] = usual if sizes.get(usual, size) == size else f"{name}_{usual}"
                    sizes[names[expression]] = size
        return cls(names, shapes)

    def rename(self, dimension: str) -> int | str:
        """A dimension as torch wrote it (``s27``, ``2*s27``, ``3``) in the names chosen here."""
        known = {str(symbol): name for symbol, name in self.names.items()} | self.others
        for match in _SYMBOL.finditer(dimension):  # a size that depends on values: how many were chosen, say
            if match[0] not in known:
                known[match[0]] = self.others[match[0]] = f"size_{len(self.others)}"
        renamed = _SYMBOL.sub(lambda match: known[match[0]], dimension)
        return int(renamed) if renamed.isdigit() else renamed

    def sizes(self, leaves: Sequence[torch.Tensor]) -> dict[str, int]:
        """The size of each named dimension in these inputs."""
        found: dict[str, int] = {}
        for leaf, shape in zip(leaves, self.shapes, strict=True):
            for size, expression in zip(leaf.shape, shape, strict=True):
                if isinstance(expression, sympy.Symbol):
                    found.setdefault(self.names[expression], size)
        return found

    def resized(self, leaves: Sequence[torch.Tensor], sizes: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        """The same inputs at other sizes: entries are repeated or left out."""
        values = {symbol: sizes[name] for symbol, name in self.names.items()}
        return tuple(
            _resized(x, [_value(e, values) for e in shape]) for x, shape in zip(leaves, self.shapes, strict=True)
        )

    def longer(self, base: Mapping[str, int], names: Collection[str]) -> Iterator[dict[str, int]]:
        """Sizes that differ from ``base`` in these dimensions, likeliest first."""
        candidates = ({**base, **{name: base[name] + step for name in names}} for step in _STEPS if names)
        return (c for c in candidates if min(c.values()) > 0)


def fixed(dimension: str | None, sizes: Mapping[str, int]) -> int | str | None:
    """A dimension with some names replaced by numbers: ``2*batch``, ``4*sequence``, ..."""
    if dimension is None or not any(re.search(rf"\b{name}\b", dimension) for name in sizes):
        return dimension
    text = re.sub(r"\b[A-Za-z_]\w*\b", lambda match: str(sizes.get(match[0], match[0])), dimension)
    try:
        return int(eval(text, {"__builtins__": {}}, dict(SYMPY_INTERP)))
    except (NameError, TypeError, SyntaxError):
        return text


def _expression(size: Any) -> Any:
    return size if isinstance(size, int) else size.node.expr


def _value(expression: Any, values: Mapping[sympy.Symbol, int]) -> int:
    return int(expression.subs(list(values.items()))) if isinstance(expression, sympy.Expr) else int(expression)


def _resized(x: torch.Tensor, sizes: Sequence[int]) -> torch.Tensor:
    for axis, size in enumerate(sizes):
        if x.shape[axis] != size:
            x = x.index_select(axis, torch.arange(size, device=x.device) % x.shape[axis])
    return x


def _usual(name: str, value: torch.Tensor, axis: int) -> str:
    """What the axes of inputs usually are: images are (B, C, H, W), anything else (B, N, ...)."""
    if axis == 0:
        return BATCH
    if name.startswith("encoder") or ".encoder." in name:
        return f"encoder_{SEQUENCE}"
    if name.startswith("past"):
        return "past_sequence"
    if value.dim() == 4 and value.is_floating_point() and "mask" not in name:
        return ("channels", "height", "width")[axis - 1]
    prefix = "decoder_" if name.startswith("decoder_") else ""
    return f"{prefix}{SEQUENCE}" if axis == 1 and value.dim() in (2, 3) else f"{name}_{axis}"
