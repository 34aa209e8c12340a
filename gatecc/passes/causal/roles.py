"""The recurrence that a part of a graph may be: its operands in their roles, and the operator on them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc import ops as ops  # registers the operator

Places = tuple[int, int, int, int]  # where (B, H, N, D) stand in a value, -1 for an axis that it lacks


@dataclass(frozen=True, eq=False)
class Operand:
    """A value in a role. ``domain``: what the value is of that role: "" itself, its "factor" (what a state is
    multiplied by, where the operator takes a logarithm), or its "logit"."""

    node: fx.Node
    places: Places
    domain: str = ""

    def spread(self, x: Tensor) -> Tensor:
        """(B, H, N, D)."""
        return spread(x, self.places)


@dataclass(frozen=True, eq=False)
class Formula:
    """o = scale * linear_attention(q * factor, k, v, decay, beta). A v of None is ones; ``constant``: log decays of the
    heads that stand in the graph as numbers; with a ``normalizer`` the log decay is logsigmoid(decay) / normalizer.
    ``assumes``: names of the buffers whose numbers were read."""

    q: Operand
    k: Operand
    out: Places
    v: Operand | None = None
    decay: Operand | None = None
    beta: Operand | None = None
    factor: Operand | None = None
    constant: tuple[float, ...] = ()
    scale: float = 1.0
    normalizer: float | None = None
    assumes: tuple[str, ...] = ()

    @property
    def domains(self) -> tuple[str, str]:
        """Of the decay and of beta."""
        return tuple("" if x is None else x.domain for x in (self.decay, self.beta))  # pyright: ignore[reportReturnType]  there are two

    @property
    def operands(self) -> list[Operand]:
        """Those that are there."""
        return [x for x in (self.q, self.k, self.v, self.decay, self.beta, self.factor) if x is not None]

    def __str__(self) -> str:
        decay = "gated " if self.decay is not None else "decayed " if self.constant else ""
        rule = "delta rule" if self.beta is not None else "linear attention"
        return f"{decay}{rule}, scale {self.scale:.6g}"


def spread(x: Tensor, places: Places) -> Tensor:
    """A value as (B, H, N, D). Axes of one place may have none of these letters."""
    kept = [p for p in places if p >= 0]
    x = x.permute(kept) if len(kept) == x.dim() else x.reshape([x.size(p) for p in sorted(kept)])
    for at, place in enumerate(places):
        x = x.unsqueeze(at) if place < 0 else x
    return x


def gathered(x: Tensor, places: Places) -> Tensor:
    """The inverse of `spread`, for the output."""
    for at in reversed(range(4)):
        x = x.squeeze(at) if places[at] < 0 else x
    kept = [p for p in places if p >= 0]
    return x.permute([kept.index(axis) for axis in range(len(kept))])


def _logarithm(factor: Tensor) -> Tensor:
    """The logarithm of what is not negative. Of zero that of the least normal number: its gradient is finite."""
    wide = factor.float() if factor.dtype in (torch.float16, torch.bfloat16) else factor
    return wide.clamp_min(torch.finfo(wide.dtype).tiny).log()


def compute(
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    decay: Tensor | None,
    beta: Tensor | None,
    factor: Tensor | None,
    constant: tuple[float, ...],
    domains: tuple[str, str],
    scale: float,
    normalizer: float | None = None,
) -> Tensor:
    """The operator on values (B, H, N, D), in the widest of the dtypes of q, k, v; ``domains``: of decay and beta."""
    dtype = torch.promote_types(q.dtype, k.dtype)
    dtype = dtype if v is None else torch.promote_types(dtype, v.dtype)
    q = q if factor is None else q * factor
    v = k.new_ones((*k.shape[:3], 1)) if v is None else v
    if decay is not None and domains[0]:
        decay = _logarithm(decay) if domains[0] == "factor" else F.logsigmoid(decay)
    if beta is not None and domains[1]:
        beta = beta.sigmoid()
    if constant:
        decay = torch.cat([q.new_full((1, 1, 1, 1), number) for number in constant], 1)
    q, k, v = (x if x.dtype == dtype else x.to(dtype) for x in (q, k, v))
    o, _ = torch.ops.gatecc.linear_attention(q, k, v, decay, beta, scale=scale, gate_normalizer=normalizer)
    return o
