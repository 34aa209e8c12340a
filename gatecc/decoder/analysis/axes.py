"""Sequence axes: which sizes of a graph are the length, and which positions an axis of a step runs over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import fx

from gatecc.ir.sizes import expression, node_shape, symbols

_TRIED = (2, 3, 5, 7, 11, 16)


@dataclass(frozen=True)
class Span:
    """The positions that an axis runs over in a step: the new ones, all up to now, or the last ones of a window.

    With ``past`` tokens before and T new ones: ``now`` is past .. past+T, ALL is 0 .. past+T, a window w is what the
    first new position sees and everything after it, past+1-w .. past+T.
    """

    now: bool = False
    window: int | None = None

    def __str__(self) -> str:
        return "now" if self.now else "all" if self.window is None else f"window {self.window}"


NOW, ALL = Span(now=True), Span()
Spans = tuple[Span | None, ...]  # one for each axis of a tensor; None where the size does not depend on the length


@dataclass(frozen=True)
class Lengths:
    """The symbols of the length, of the batch, and of other sizes (the lengths of what an encoder reads).

    ``bound`` is the largest length that the capture allows.
    """

    length: frozenset[sympy.Symbol]
    batch: frozenset[sympy.Symbol]
    bound: int
    other: frozenset[sympy.Symbol] = frozenset()
    known: dict[Any, list[Any]] = field(default_factory=dict[Any, list[Any]], compare=False)

    def has(self, size: Any) -> bool:
        """Whether a size varies with the length; ``1 - Max(0, 1 - s)`` does not."""
        if not symbols(size) & self.length:
            return False
        return expression(size) in self.length or len(set(self._values(size))) > 1

    def settled(self, size: Any) -> Any:
        """A size without the symbol of the length where it does not vary with it: ``1 - Max(0, 1 - s)`` is 1."""
        return self._values(size)[0] if symbols(size) & self.length and not self.has(size) else size

    def foreign(self, size: Any) -> bool:
        """Whether a size depends on the length of a context."""
        return bool(symbols(size) & self.other)

    def pure(self, size: Any) -> bool:
        """Whether a size is the length itself: its value equals the length at every length that is tried.

        ``128 - Max(0, 128 - s)``, for example, is the length in a model of 128 positions.
        """
        if not self.has(size):
            return False
        return expression(size) in self.length or self._values(size) == self._tried()

    def _tried(self) -> list[int]:
        return [n for n in _TRIED if n <= self.bound]

    def _values(self, size: Any) -> list[Any]:
        """The values of a size at the lengths that are tried."""
        found = expression(size)
        if found not in self.known:
            at = [found.xreplace(dict.fromkeys(self.length, sympy.Integer(n))) for n in self._tried()]
            self.known[found] = [int(v) if v.is_Integer else v for v in at]
        return self.known[found]

    def axes(self, node: fx.Node) -> list[int]:
        """The axes of a tensor node whose sizes depend on the length."""
        return [i for i, size in enumerate(node_shape(node) or ()) if self.has(size)]

    def is_flat(self, node: fx.Node) -> bool:
        """Whether a tensor has an axis of a multiple of the length, such as the flattened tokens of all samples."""
        return any(self.has(size) and not self.pure(size) for size in node_shape(node) or ())
