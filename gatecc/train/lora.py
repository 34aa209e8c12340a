"""LoRA as a function of the weights: W + alpha/rank · B A, for any parameter matrix of any module.

The modules stay as they are. A training step hands the sums to the model through ``torch.func.functional_call``, so a
captured graph, which reads ``self.q_proj.weight``, is adapted exactly as a Python forward is; a wrapper module in place
of the Linear would have to be captured anew, with weights that no rewrite can read. `merge` writes the sums for good.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError


@dataclass(frozen=True)
class Lora:
    """Low-rank adapters (Hu et al., 2021): rank, scale alpha/rank, and the globs of the parameters that get one.

    ``targets`` match names such as ``model.layers.0.self_attn.q_proj.weight``. ``package="peft"`` makes them with the
    library of that name, in Python modules only; its adapters stay in the student, for peft to save or merge.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("*q_proj.weight", "*k_proj.weight", "*v_proj.weight", "*o_proj.weight")
    package: str = "gatecc"

    def __post_init__(self) -> None:
        if self.rank < 1 or self.alpha <= 0 or not self.targets or self.package not in ("gatecc", "peft"):
            raise ArgumentError(
                "no such adapters",
                found=str(self),
                expected='rank >= 1, alpha > 0, targets, package "gatecc" or "peft"',
            )


class Adapters(nn.Module):
    """The factors A (rank, in) and B (out, rank) of each adapted matrix, float32; B starts at 0, so nothing changes."""

    def __init__(self, model: nn.Module, spec: Lora) -> None:
        """Raises ArgumentError if a target matches no parameter of two axes."""
        super().__init__()
        self.spec = spec
        self.names = adapted(model, spec.targets)
        weights = dict(model.named_parameters())
        self.a, self.b = nn.ParameterList(), nn.ParameterList()
        for w in (weights[n] for n in self.names):
            a = torch.empty(spec.rank, w.shape[1], device=w.device)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
            self.a.append(nn.Parameter(a))
            self.b.append(nn.Parameter(torch.zeros(w.shape[0], spec.rank, device=w.device)))

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The sums by name, with gradient to A and B: what ``functional_call`` takes."""
        own = dict(model.named_parameters())
        return {n: own[n].detach() + d.to(own[n].dtype) for n, d in zip(self.names, self._deltas(), strict=True)}

    @torch.no_grad()
    def merge(self, model: nn.Module) -> None:
        """Add the products to the model's weights in place, and set B to 0."""
        own = dict(model.named_parameters())
        for name, delta in zip(self.names, self._deltas(), strict=True):
            own[name].add_(delta)
        for b in self.b:
            b.zero_()

    @contextmanager
    def merged(self, model: nn.Module) -> Generator[None]:
        """The model with the sums as its weights, for an evaluation; bitwise as before afterwards."""
        own = dict(model.named_parameters())
        before = [own[n].detach().clone() for n in self.names]
        try:
            with torch.no_grad():
                for name, delta in zip(self.names, self._deltas(), strict=True):
                    own[name].add_(delta)
            yield
        finally:
            with torch.no_grad():
                for name, old in zip(self.names, before, strict=True):
                    own[name].copy_(old)

    def _deltas(self) -> list[Tensor]:
        scale = self.spec.alpha / self.spec.rank
        return [scale * (b @ a) for a, b in zip(self.a, self.b, strict=True)]


def adapted(model: nn.Module, targets: Sequence[str]) -> list[str]:
    """The names of the matrices that the globs select. Raises ArgumentError for a glob that selects none."""
    matrices = [n for n, p in model.named_parameters() if p.dim() == 2]
    for target in targets:
        if not any(fnmatchcase(n, target) for n in matrices):
            raise ArgumentError("a target selects no matrix of the student", found=target, expected=", ".join(matrices))
    return [n for n in matrices if any(fnmatchcase(n, t) for t in targets)]
