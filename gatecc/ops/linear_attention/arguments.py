"""What may be given to ``gatecc::linear_attention``, and what follows from it: the rule, the sizes, the scale."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._C._functorch import is_batchedtensor

from gatecc.errors import ArgumentError

Rule = Literal["linear", "gated", "delta", "gated_delta"]


class Arguments(NamedTuple):
    """The arguments of one call, checked. Sizes may be symbolic.

    q: (B, H, N, Dk), k: (B, Hk, N, Dk), v: (B, Hv, N, Dv), log_decay: (B or 1, Hg, N or 1, Dk or 1) and beta:
    (B, Hb, N, 1), where each of Hk, Hv, Hg, Hb divides H. initial_state: (S, H, Dk, E), S the number of sequences (B,
    or those of ``cu_seqlens``) and E = Dv, or Dv + 1 with the normaliser.
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
    gate_normalizer: float | None

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
    gate_normalizer: float | None = None,
) -> Arguments:
    """Check the arguments of a call. Raises ArgumentError for shapes, dtypes or options that do not fit."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.dim() != 4:
            raise _misfit(f"{name} of linear attention has four axes", x.shape, "(B, H, N, D)")
    if not (q.dtype == k.dtype == v.dtype and q.is_floating_point()):
        raise _misfit(
            "q, k and v have one dtype, a floating-point one", (q.dtype, k.dtype, v.dtype), "the same three times"
        )
    if beta is not None and beta.dim() == 3:
        beta = beta.unsqueeze(-1)
    factor = q.size(3) ** -0.5 if scale is None else scale
    options = (factor, reverse, normalize, cu_seqlens, mask, gate_normalizer)
    found = Arguments(q, k, v, log_decay, beta, initial_state, *options)
    _check_operands(found)
    _check_options(found)
    return found


def read(tensors: Sequence[Tensor | None], options: dict[str, Any]) -> Arguments:
    """``arguments`` of an operator's call: its tensors in order, of which the last may be left out, and its options."""
    q, k, v, log_decay, beta, state, cu_seqlens, mask = (*tensors, *[None] * (8 - len(tensors)))
    assert q is not None
    assert k is not None
    assert v is not None
    return arguments(q, k, v, log_decay, beta, state, cu_seqlens=cu_seqlens, mask=mask, **options)


def boundaries(cu_seqlens: Tensor, tokens: int) -> list[tuple[int, int]]:
    """First and last-plus-one token of each packed sequence. Raises ArgumentError if they do not cover the tokens."""
    if is_batchedtensor(cu_seqlens):
        raise _misfit("cu_seqlens is one for a whole vmap", "another for each sample", "in_dims=None for it")
    edges: list[int] = cu_seqlens.tolist()
    if not edges or edges[0] != 0 or edges[-1] != tokens or edges != sorted(edges):
        raise _misfit("cu_seqlens does not divide the tokens", edges, f"ascending from 0 to {tokens}")
    return list(pairwise(edges))


def _check_operands(a: Arguments) -> None:
    B, H, N, Dk = a.q.shape
    for name, x, width in (("k", a.k, Dk), ("v", a.v, a.v.size(3)), ("beta", a.beta, 1)):
        if x is not None:
            _check_heads(name, x, H)
            _check_shape(name, x, (B, x.size(1), N, width))
    if a.log_decay is None:
        return
    _check_heads("log_decay", a.log_decay, H)
    rows, _, tokens, width = a.log_decay.shape
    if rows not in (1, B) or tokens not in (1, N) or width not in (1, Dk):
        expected = f"(1 or {B}, heads, 1 or {N}, 1 or {Dk})"
        raise _misfit("log_decay does not fit q", a.log_decay.shape, expected)


def _check_options(a: Arguments) -> None:
    if a.normalize and a.beta is not None:
        raise _misfit("a delta rule has no normaliser", "beta and normalize=True", "one of the two")
    if a.gate_normalizer is not None and (a.log_decay is None or a.gate_normalizer <= 0):
        found = f"gate_normalizer={a.gate_normalizer}" + (" without logits" if a.log_decay is None else "")
        raise _misfit("gate_normalizer divides logsigmoid(log_decay)", found, "log_decay, and a normaliser above 0")
    if a.mask is not None:
        _check_shape("mask", a.mask, (a.q.size(0), a.q.size(2)))
        if a.mask.dtype != torch.bool:
            raise _misfit("mask is True at tokens and False at padding", a.mask.dtype, "torch.bool")
    packs = a.cu_seqlens
    if packs is not None and (a.q.size(0) != 1 or packs.dim() != 1 or packs.is_floating_point()):
        found = (tuple(a.q.shape), tuple(packs.shape), packs.dtype)
        raise _misfit("packed sequences lie in one row", found, "q: (1, H, N, Dk), cu_seqlens: (S + 1,) of integers")
    if a.initial_state is not None:
        _check_shape("initial_state", a.initial_state, a.state_shape)


def _check_heads(name: str, x: Tensor, heads: int) -> None:
    if x.dim() != 4:
        raise _misfit(f"{name} of linear attention has four axes", x.shape, "(B, H, N, D)")
    if x.size(1) == 0 or heads % x.size(1):
        raise _misfit(f"the heads of {name} do not divide those of q", x.size(1), f"a divisor of {heads}")


def _check_shape(name: str, x: Tensor, shape: Sequence[int]) -> None:
    if x.shape != shape:
        raise _misfit(f"{name} does not fit q", x.shape, str(tuple(shape)))


def _misfit(what: str, found: object, expected: str) -> ArgumentError:
    return ArgumentError(what, found=str(tuple(found) if isinstance(found, torch.Size) else found), expected=expected)
