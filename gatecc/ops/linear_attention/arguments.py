"""What may be given to ``gatecc::linear_attention``, and what follows from it: the rule, the sizes, the scale."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gatecc.errors import ArgumentError

Rule = Literal["linear", "gated", "delta", "gated_delta"]


@dataclass(frozen=True)
class Arguments:
    """The arguments of one call, checked. Sizes may be symbolic.

    q: (B, H, N, Dk), k: (B, Hk, N, Dk), v: (B, Hv, N, Dv), log_decay: (B or 1, Hg, N or 1, Dk or 1), beta: (B, Hb, N, 1),
    where each of Hk, Hv, Hg, Hb divides H. initial_state: (S, H, Dk, E), S the number of sequences (B, or those of
    ``cu_seqlens``) and E = Dv, or Dv + 1 with the normaliser.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    initial_state: Tensor | None
    scale: float
    reverse: bool
    normalize: bool
    cu_seqlens: Tensor | None
    mask: Tensor | None

    @property
    def rule(self) -> Rule:
        """The update rule follows from what is given."""
        if self.beta is None:
            return "linear" if self.log_decay is None else "gated"
        return "delta" if self.log_decay is None else "gated_delta"

    @property
    def state_dtype(self) -> torch.dtype:
        """float32; float64 for float64 inputs."""
        return torch.promote_types(self.q.dtype, torch.float32)

    @property
    def state_shape(self) -> tuple[int, int, int, int]:
        """(S, H, Dk, E)."""
        sequences = self.q.size(0) if self.cu_seqlens is None else self.cu_seqlens.size(0) - 1
        return sequences, self.q.size(1), self.q.size(3), self.v.size(3) + int(self.normalize)

    @property
    def output_shape(self) -> tuple[int, int, int, int]:
        """(B, H, N, Dv)."""
        return self.q.size(0), self.q.size(1), self.q.size(2), self.v.size(3)


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> Arguments:
    """Check the arguments of a call. Raises ArgumentError for shapes, dtypes or options that do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _demand(x.dim() == 4, f"{name} of linear attention has four axes", x.shape, "(B, H, N, D)")
        _demand(
            x.is_floating_point(), f"{name} of linear attention is a floating-point tensor", x.dtype, "float16, ..."
        )
    _demand(
        q.dtype == k.dtype == v.dtype, "q, k and v have one dtype", (q.dtype, k.dtype, v.dtype), "the same three times"
    )
    B, H, N, Dk = q.shape
    if beta is not None and beta.dim() == 3:
        beta = beta.unsqueeze(-1)
    _check_heads(H, k=k, v=v, log_decay=log_decay, beta=beta)
    _check_shape("k", k, (B, k.size(1), N, Dk))
    _check_shape("v", v, (B, v.size(1), N, v.size(3)))
    _check_shape("beta", beta, (B, 1 if beta is None else beta.size(1), N, 1))
    if log_decay is not None:
        broadcast = all(
            have in (1, want) for have, want in zip(log_decay.shape, (B, log_decay.size(1), N, Dk), strict=True)
        )
        _demand(broadcast, "log_decay does not fit q", log_decay.shape, f"(1 or {B}, heads, 1 or {N}, 1 or {Dk})")
    _demand(not (normalize and beta is not None), "a delta rule has no normaliser", "beta and normalize=True", "either")
    _check_shape("mask", mask, (B, N))
    _demand(mask is None or mask.dtype == torch.bool, "mask is True at tokens and False at padding", mask, "dtype bool")
    if cu_seqlens is not None:
        _demand(B == 1, "packed sequences lie in one row", f"B = {B}", "q: (1, H, total length, Dk)")
        _demand(
            cu_seqlens.dim() == 1 and not cu_seqlens.is_floating_point(),
            "cu_seqlens",
            cu_seqlens.shape,
            "(S + 1,) of integers",
        )
    scale = Dk**-0.5 if scale is None else scale
    found = Arguments(q, k, v, log_decay, beta, initial_state, scale, reverse, normalize, cu_seqlens, mask)
    _check_shape("initial_state", initial_state, found.state_shape)
    return found


def boundaries(cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    """First and last-plus-one token of each packed sequence. Raises ArgumentError if they do not cover the tokens."""
    edges: list[int] = cu_seqlens.tolist()
    covering = bool(edges) and edges[0] == 0 and edges[-1] == tokens and edges == sorted(edges)
    _demand(covering, "cu_seqlens does not divide the tokens", edges, f"ascending from 0 to {tokens}")
    return list(zip(edges[:-1], edges[1:], strict=True))


def _check_heads(heads: int, **operands: Tensor | None) -> None:
    for name, x in operands.items():
        if x is None:
            continue
        _demand(x.dim() == 4, f"{name} of linear attention has four axes", x.shape, "(B, H, N, D)")
        divides = x.size(1) > 0 and heads % x.size(1) == 0
        _demand(divides, f"the heads of {name} do not divide those of q", x.size(1), f"a divisor of {heads}")


def _check_shape(name: str, x: Tensor | None, shape: Sequence[int]) -> None:
    if x is not None:
        _demand(tuple(x.shape) == tuple(shape), f"{name} does not fit q", tuple(x.shape), str(tuple(shape)))


def _demand(holds: bool, what: str, found: object, expected: str) -> None:
    if not holds:
        raise ArgumentError(
            what, found=str(tuple(found) if isinstance(found, torch.Size) else found), expected=expected
        )
