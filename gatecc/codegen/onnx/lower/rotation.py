"""Rotation: the tables of a rotary embedding, from what the graph does to vectors; no spelling of it is read.

What stands between the queries before and after is evaluated at all positions with three vectors: two that show the
tables, and a random one that shows that nothing else is done (by halves or by pairs, on all channels or the first ones,
with any scaling of positions).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from gatecc.codegen.onnx.lower.views import equal_shapes
from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator, Slice, UnprovableError
from gatecc.ir.ops import CONTRACTIONS, opname
from gatecc.ir.sizes import expression

_TOLERANCE = 1e-5
_LATER = ((1, 1), (5, 3), (17, 2))  # positions before, and those that are evaluated


@dataclass(frozen=True, eq=False)
class Rotation:
    """``cos`` and ``sin``: (positions, width / 2). The first ``width`` channels are turned, in pairs that lie beside
    each other if ``interleaved``, else in halves."""

    cos: Tensor
    sin: Tensor
    width: int
    interleaved: bool

    def equals(self, other: Rotation) -> bool:
        """Whether both do the same."""
        alike = (self.width, self.interleaved) == (other.width, other.interleaved)
        return alike and torch.equal(self.cos, other.cos) and torch.equal(self.sin, other.sin)


def rotation(
    raw: fx.Node, turned: fx.Node, evaluator: Evaluator, positions: int | None, past: sympy.Symbol | None = None
) -> Rotation:
    """What turns ``raw`` into ``turned``, both (B, H, N, D). Raises UnprovableError if that is no rotary embedding.

    ``positions`` is how many are evaluated; a graph of one fixed length has as many as that. ``past``: the size that
    counts the positions before the first of these, if there may be some.
    """
    part = evaluator.slice(turned, given=frozenset({raw}))
    if part.inputs:
        raise UnprovableError(f"the angles depend on the input {part.inputs[0].name}")
    if part.content:
        raise UnprovableError("other activations than the queries take part")
    run = _Run(evaluator, part, raw, positions, {} if past is None else {past: 0})
    width = run.turned_channels()
    for interleaved in (False, True):
        found = run.tables(width, interleaved)
        if run.explains(found):
            if past is not None:
                _check_later(found, raw, evaluator, part, past)
            return found
    raise UnprovableError("queries are changed by their position in another way than a rotary embedding does")


def _check_later(found: Rotation, raw: fx.Node, evaluator: Evaluator, part: Slice, past: sympy.Symbol) -> None:
    """Raise UnprovableError if behind some positions the embedding is another one than the tables say."""
    for before, new in _LATER:
        if before + new > len(found.cos):
            continue
        rows = slice(before, before + new)
        later = Rotation(found.cos[rows], found.sin[rows], found.width, found.interleaved)
        if not _Run(evaluator, part, raw, new, {past: before}).explains(later):
            raise UnprovableError("the angles are not those of the positions")


def values_before(turned: fx.Node, flow: Flow) -> list[fx.Node]:
    """The values of the same shape that a value is made of, the latest first, up to the product that made them."""
    found: list[fx.Node] = []
    seen, stack = set[fx.Node](), [turned]
    while stack:
        for node in stack.pop().all_input_nodes:
            if node in seen or node not in flow.data or opname(node) in CONTRACTIONS:
                continue
            seen.add(node)
            stack.append(node)
            found += [node] if equal_shapes(node, turned) else []
    return sorted(found, key=flow.order.__getitem__, reverse=True)


class _Run:
    """Evaluations of one rotary embedding."""

    def __init__(
        self, evaluator: Evaluator, part: Slice, raw: fx.Node, positions: int | None, others: dict[sympy.Symbol, int]
    ) -> None:
        self.evaluator, self.part, self.raw = evaluator, part, raw
        held: Any = raw.meta["val"]
        sizes: dict[sympy.Symbol, int] = dict(others)
        for axis, size in enumerate(held.shape):
            if isinstance(size, int):
                continue
            symbol = expression(size)
            if not isinstance(symbol, sympy.Symbol) or axis not in (0, 2):
                raise UnprovableError(f"the size {size} of the queries is no size of an input")
            if axis == 2 and positions is None:
                raise UnprovableError("nobody says for how many positions the model is made (config)")
            sizes[symbol] = 1 if axis == 0 else positions or 1
        self.sizes: Any = sizes
        batch, heads, tokens, width = (s if isinstance(s, int) else sizes[expression(s)] for s in held.shape)
        self.shape, self.dtype = (batch, heads, tokens, width), held.dtype
        self.random = torch.randn(self.shape, generator=torch.Generator().manual_seed(0)).to(self.dtype)
        self.after = self.at(self.random)

    def at(self, x: Tensor) -> Tensor:
        found = self.evaluator.run(self.part, self.sizes, {self.raw: x})
        if found.shape != x.shape:
            raise UnprovableError("the shape of the queries changes")
        return found

    def turned_channels(self) -> int:
        """How many of the first channels change."""
        changed = (self.after != self.random).any(0).any(0).any(0).nonzero()
        if not len(changed):
            raise UnprovableError("no channel depends on the position")
        width = int(changed[-1]) + 1
        return width + width % 2

    def tables(self, width: int, interleaved: bool) -> Rotation:
        first = torch.zeros(self.shape, dtype=self.dtype)
        one, two = _halves(first, width, interleaved)
        one.fill_(1.0)
        out = self.at(first)
        cos, sin = (x[0, 0].float().clone() for x in _halves(out, width, interleaved))
        del two
        return Rotation(cos, sin, width, interleaved)

    def explains(self, found: Rotation) -> bool:
        """Whether the tables say what was done to the random vectors."""
        expected = self.random.float().clone()
        a, b = (x.clone() for x in _halves(expected, found.width, found.interleaved))
        one, two = _halves(expected, found.width, found.interleaved)
        one.copy_(a * found.cos - b * found.sin)
        two.copy_(b * found.cos + a * found.sin)
        tolerance = _TOLERANCE if self.dtype == torch.float32 else 1e-2
        return bool(torch.allclose(expected, self.after.float(), atol=tolerance, rtol=tolerance))


def _halves(x: Tensor, width: int, interleaved: bool) -> tuple[Tensor, Tensor]:
    """The two channels of every pair, as views."""
    turned = x[..., :width]
    if interleaved:
        return turned[..., 0::2], turned[..., 1::2]
    return turned[..., : width // 2], turned[..., width // 2 :]
