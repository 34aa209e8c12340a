"""Linear attention in ATen, chunk by chunk: the form for devices without a kernel, and for a CPU without a compiler.

Inside a chunk the recurrence is masked attention with weights q_i · k_j e^(b_i - b_j), b the running sum of log decays
(Yang et al. 2024, GLA). e^(b_i) and e^(-b_j) apart would overflow; here pairs of the two halves of a chunk meet at the
boundary between them, where both factors are at most 1, and so on inside each half, down to blocks of 8 tokens. They
are small enough for a reference point in their middle once log decays are clamped at -16: a gate below e^-16 forgets
all but 1e-7 of a state, and its own gradient is zero.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
BLOCK = 8
STRONGEST = -16.0


def chunked(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """See ``token_by_token``, whose arguments and results these are."""
    N = q.size(2)
    if N == 0:
        return v * q.sum(-1, keepdim=True), state
    decay = q.new_zeros(1, 1, N, 1) if log_decay is None else log_decay.clamp_min(STRONGEST)
    q, k, v, decay = (_split(x) for x in (q, k, v, decay.expand(*q.shape[:3], decay.size(3))))
    b = decay.cumsum(-2)
    last = b[..., -1:, :]
    inner = _weights(q, k, b)
    reads, writes, kept = q * b.exp(), k * (last - b).exp(), last.exp().mT
    solve = lookups = None
    if beta is not None:
        solve, lookups = _corrections(k, b, _split(beta)), k * b.exp()
    out: list[Tensor] = []
    for n in range(q.size(2)):
        u = v[:, :, n]
        if solve is not None and lookups is not None:
            u = solve[:, :, n] @ (u - lookups[:, :, n] @ state)
        out.append(reads[:, :, n] @ state + inner[:, :, n] @ u)
        state = kept[:, :, n] * state + writes[:, :, n].mT @ u
    return torch.cat(out, 2)[:, :, :N], state


def _split(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, H, chunks, C, D), with zeros, which change nothing, after the last token."""
    N = x.size(2)
    C = min(CHUNK, max(BLOCK, 1 << (N - 1).bit_length()))
    return F.pad(x, (0, 0, 0, -N % C)).unflatten(2, (-1, C))


def _weights(q: Tensor, k: Tensor, b: Tensor) -> Tensor:
    """q_i · k_j e^(b_i - b_j) for j <= i, zero above: (..., C, C)."""
    C = q.size(-2)
    if C <= BLOCK:
        middle = b[..., C // 2 : C // 2 + 1, :]
        return ((q * (b - middle).exp()) @ (k * (middle - b).exp()).mT).tril()
    halves = (x.unflatten(-2, (2, C // 2)) for x in (q, k, b))
    qs, ks, bs = halves
    diagonal = _weights(qs, ks, bs)
    edge = bs[..., 0, -1:, :]
    below = (qs[..., 1, :, :] * (bs[..., 1, :, :] - edge).exp()) @ (
        ks[..., 0, :, :] * (edge - bs[..., 0, :, :]).exp()
    ).mT
    upper = torch.cat([diagonal[..., 0, :, :], torch.zeros_like(below)], -1)
    return torch.cat([upper, torch.cat([below, diagonal[..., 1, :, :]], -1)], -2)


def _corrections(k: Tensor, b: Tensor, beta: Tensor) -> Tensor:
    """What turns v - (what the state before the chunk holds) into what is written, (..., C, C).

    u_i = beta_i (r_i - sum_{j<i} k_i · k_j e^(b_i - b_j) u_j) is a triangular system (the UT transform, Yang et al.
    2024, Parallelizing Linear Transformers with the Delta Rule).
    """
    system = torch.eye(k.size(-2), dtype=k.dtype, device=k.device) + (beta * _weights(k, k, b)).tril(-1)
    return torch.linalg.solve_triangular(system, torch.diag_embed(beta.squeeze(-1)), upper=False, unitriangular=True)
