"""Widths: experts of different sizes behind one router, those of one size in a stack of their own, without padding."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.experts import Experts
from gatecc.passes.route.ffn import FFN
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Widths(ExpertsSpec, tag="widths"):
    """An expert for each of ``shares``, of so many of the layer's hidden neurons: 0.5 half of them, 2 twice as many.

    A smaller expert has the strongest neurons of the layer (as `Copies` with ``keep``) and is another function; further
    neurons start without a way out. Experts of one share lie in one stack, in the order in which shares first appear:
    the modules ``groups.0``, ``groups.1``, ... (heterogeneous experts, Switch-NeRF++, 2025).
    """

    shares: tuple[float, ...]

    def check(self) -> None:
        object.__setattr__(self, "shares", tuple(float(share) for share in self.shares))
        self.require(bool(self.shares) and min(self.shares) > 0, "shares", "a positive number for each expert")

    @property
    def count(self) -> int:
        return len(self.shares)

    @property
    def keeps_function(self) -> bool:
        return min(self.shares) >= 1

    @property
    def cuts(self) -> bool:
        return min(self.shares) < 1

    @property
    def numbers(self) -> tuple[tuple[int, ...], ...]:
        """The numbers of the experts of each stack."""
        return tuple(tuple(e for e, own in enumerate(self.shares) if own == s) for s in dict.fromkeys(self.shares))

    def hidden(self, features: int) -> int:
        raise ArgumentError(
            "experts of different sizes have no common one",
            found=str(self),
            do="use them by themselves: shared(...) and parts of features take experts of one size",
        )

    def build(self, ffn: FFN, device: torch.device | None, dtype: torch.dtype | None) -> nn.Module:
        specs = self._specs(ffn.hidden)
        return ExpertsOfWidths([spec.build_one(ffn, device, dtype) for spec in specs], self.numbers)

    def stacks(self, made: nn.Module, features: int) -> Iterator[tuple[Experts, ExpertsSpec]]:
        assert isinstance(made, ExpertsOfWidths)
        yield from zip(made.experts, self._specs(features), strict=True)

    def _specs(self, features: int) -> list[Copies]:
        """Those of the stacks."""
        made: list[Copies] = []
        for numbers in self.numbers:
            share = self.shares[numbers[0]]
            made.append(Copies(len(numbers), 0.0, min(share, 1.0), max(0, round((share - 1) * features))))
        return made


class ExpertsOfWidths(nn.Module):
    """Stacks of experts; ``numbers`` says which numbers of the router each holds.

    ``forward(x, weights, indices)`` as of `Experts`: each stack serves the slots that are its own, to it the others are
    empty.
    """

    local: Tensor

    def __init__(self, stacks: list[Experts], numbers: tuple[tuple[int, ...], ...]) -> None:
        super().__init__()
        self.groups = nn.ModuleList(stacks)
        options = sum(map(len, numbers)) + 1  # an empty slot is one
        local = torch.stack([torch.full((options,), len(own)) for own in numbers])
        for row, own in zip(local, numbers, strict=True):
            row[list(own)] = torch.arange(len(own))
        device = stacks[0].down_proj.device
        self.register_buffer("local", local.to(device), persistent=False)

    @property
    def experts(self) -> list[Experts]:
        """The stacks."""
        return [m for m in self.groups if isinstance(m, Experts)]

    def forward(self, x: Tensor, weights: Tensor, indices: Tensor) -> Tensor:
        """x: (..., d), weights and indices: (T, k) for the T positions of x -> (..., o)"""
        first, *others = [
            stack(x, weights, own[indices]) for stack, own in zip(self.experts, self.local.unbind(), strict=True)
        ]
        for other in others:
            first = first + other
        return first
