"""Copies: every expert is the dense layer, as it is, with noise, of another width, or partly anew."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gatecc.errors import ArgumentError
from gatecc.passes.route.ffn import Stacked
from gatecc.passes.route.spec import ExpertsSpec


@dataclass(frozen=True)
class Copies(ExpertsSpec, tag="copies"):
    """Every expert is the dense layer (Sparse Upcycling, 2022).

    ``noise``: normal noise on every weight, as a share of the standard deviation of its matrix; it breaks the symmetry
    of the experts, and the function. ``keep``: the share of hidden neurons that an expert has, the strongest (the
    length of a neuron's rows times that of its column); fewer change the function. ``extra``: further neurons, which
    start with random rows and no way out, so that they change nothing.
    """

    n: int
    noise: float = 0.0
    keep: float = 1.0
    extra: int = 0

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive number of experts")
        self.require(self.noise >= 0, "noise", "a number >= 0")
        self.require(0 < self.keep <= 1, "keep", "a number in (0, 1]")
        self.require(self.extra >= 0, "extra", "a number of neurons >= 0")

    @property
    def count(self) -> int:
        return self.n

    @property
    def keeps_function(self) -> bool:
        return not self.noise and self.keep == 1

    @property
    def cuts(self) -> bool:
        return self.keep < 1

    def hidden(self, features: int) -> int:
        return self._kept(features) + self.extra

    def _kept(self, features: int) -> int:
        return max(1, round(self.keep * features))

    def neurons(self, dense: Stacked, name: str) -> torch.Tensor:
        features = dense.down.size(1)
        kept = torch.arange(features)
        if self.keep < 1:
            rows = dense.gate_up.float().norm(dim=1).view(-1, features).prod(0)
            strength = rows * dense.down.float().norm(dim=0)
            kept = strength.topk(self._kept(features)).indices.sort().values.cpu()
        return torch.cat([kept, torch.full((self.extra,), -1)]).unsqueeze(0)

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        if self.noise:
            for stack, one in ((experts.gate_up, dense.gate_up), (experts.down, dense.down)):
                stack.add_(torch.randn_like(stack) * (self.noise * one.float().std().item()))


@dataclass(frozen=True)
class Drop(ExpertsSpec, tag="drop"):
    """Copies in which a share of the hidden neurons starts anew, others in each expert (Drop-Upcycling, 2025).

    Their rows and columns are drawn with the mean and the standard deviation of the matrix that they belong to.
    """

    n: int
    share: float = 0.5

    def check(self) -> None:
        self.require(self.n > 0, "n", "a positive number of experts")
        self.require(0 < self.share <= 1, "share", "a number in (0, 1]")

    @property
    def count(self) -> int:
        return self.n

    @property
    def keeps_function(self) -> bool:
        return False

    def finish(self, experts: Stacked, dense: Stacked) -> None:
        features = dense.down.size(1)
        new = round(self.share * features)
        if not new:
            raise ArgumentError(
                "no neuron would start anew",
                found=f"share={self.share} of {features} neurons",
                expected="a larger share",
            )
        halves = dense.gate_up.size(0) // features
        for e in range(experts.down.size(0)):
            at = torch.randperm(features, device=dense.down.device)[:new]
            for half in range(halves):
                rows = dense.gate_up[half * features : (half + 1) * features]
                experts.gate_up[e, at + half * features] = _like(rows, (new, rows.size(1)))
            experts.down[e, :, at] = _like(dense.down, (dense.down.size(0), new))


def _like(matrix: torch.Tensor, sizes: tuple[int, int]) -> torch.Tensor:
    """Normal numbers with the mean and the standard deviation of a matrix."""
    drawn = torch.randn(sizes, device=matrix.device, dtype=torch.float32)
    return (drawn * matrix.float().std() + matrix.float().mean()).to(matrix.dtype)
