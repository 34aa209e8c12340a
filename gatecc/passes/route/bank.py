"""Bank: the pieces of a layer that one router's experts take the place of, and how these are filled from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.ffn import FFN, Stacked
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Piece:
    """``count`` experts from number ``first`` on yield the output features ``start`` to ``stop`` of the layer."""

    first: int
    count: int
    start: int
    stop: int


@dataclass(frozen=True)
class Bank:
    """Experts behind one router. ``chosen``: how many run for a token. ``slots``: each slot's result is a part of the
    features, and they are not added.
    """

    spec: ExpertsSpec
    ffn: FFN
    scale: float
    pieces: tuple[Piece, ...]
    chosen: int
    slots: bool = False

    def build(self, like: Tensor | None) -> nn.Module:
        """The module, not filled, on the device and in the dtype of a weight of the layer."""
        features = self.pieces[0].stop - self.pieces[0].start
        device, dtype = (None, None) if like is None else (like.device, like.dtype)
        made = self.spec.build(replace(self.ffn, out=features), device, dtype)
        for experts, _ in self.spec.stacks(made, self.ffn.hidden):
            experts.combine = "slots" if self.slots else "sum"
            experts.chosen = min(self.chosen, experts.down_proj.size(0))
        return made

    def fill(self, made: nn.Module, dense: Stacked) -> None:
        """Write the experts from the weights of their layer."""
        for experts, spec in self.spec.stacks(made, self.ffn.hidden):
            for piece in self.pieces:
                rows, at = slice(piece.start, piece.stop), slice(piece.first, piece.first + piece.count)
                bias = None if dense.down_bias is None else dense.down_bias[rows]
                part = dense._replace(down=dense.down[rows], down_bias=bias)
                spec.fill(_some(experts, at), part, self.scale, self.ffn.last)
                if experts.bias is not None and bias is not None:
                    experts.bias.copy_(bias)


def _some(experts: Experts, at: slice) -> Stacked:
    def part(stack: Tensor | None) -> Any:
        return None if stack is None else stack[at]

    return Stacked(
        *map(part, (experts.gate_up_proj, experts.gate_up_proj_bias, experts.down_proj, experts.down_proj_bias))
    )


def whole(spec: ExpertsSpec, ffn: FFN) -> tuple[Piece, ...]:
    """All experts yield all features."""
    return (Piece(0, spec.count, 0, ffn.out),)


def of_slots(spec: ExpertsSpec, ffn: FFN, slots: int) -> tuple[Piece, ...]:
    """The experts of the k-th slot yield the k-th part of the features. Raises ArgumentError."""
    each, some = _part(ffn, slots), spec.count // slots
    return tuple(Piece(i * some, some, i * each, (i + 1) * each) for i in range(slots))


def half(spec: ExpertsSpec, ffn: FFN, number: int) -> tuple[Piece, ...]:
    """All experts yield the first or the second half of the features. Raises ArgumentError."""
    each = _part(ffn, 2)
    return (Piece(0, spec.count, number * each, (number + 1) * each),)


def _part(ffn: FFN, parts: int) -> int:
    if ffn.out % parts:
        raise ArgumentError(
            "the output features do not fall into parts of one size", found=f"{ffn.out} features, {parts} parts"
        )
    return ffn.out // parts


def smoothed(y: Tensor, weights: Tensor) -> Tensor:
    """y + sum_j w_j (1 - w_j) / o. y: (..., o), weights: (T, k)."""
    share = (weights * (1 - weights)).sum(-1) / y.size(-1)
    return y + share.view(*y.shape[:-1], 1).to(y.dtype)


def joined(*parts: Tensor) -> Tensor:
    """The features of several banks."""
    return torch.cat(parts, -1)
