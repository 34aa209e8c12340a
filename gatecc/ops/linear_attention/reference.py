"""The recurrence of linear attention in plain ATen, token by token: the truth that every kernel is compared with."""

from __future__ import annotations

import torch
from torch import Tensor


def token_by_token(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
) -> tuple[Tensor, Tensor]:
    """o: (B, H, N, Dv) and the final state, (B, H, Dk, Dv), in the dtype of ``state``. Differentiable.

    S_t = diag(e^g_t) S_{t-1} + k_t u_t^T and o_t = S_t^T q_t. The rule decides what is written: u_t = v_t, or for the
    delta rules beta_t (v_t - (diag(e^g_t) S_{t-1})^T k_t), the correction of what key k_t retrieves
    (Schlag et al. 2021, Linear Transformers Are Secretly Fast Weight Programmers; Yang et al. 2025, Gated Delta Nets).
    Gates are applied as e^g, one by one: a gate of exactly 0 (g = -inf) is exact, and so is any chain of small ones.
    """
    out: list[Tensor] = []
    for t in range(q.size(2)):
        key, value = k[:, :, t], v[:, :, t]
        if log_decay is not None:
            state = log_decay[:, :, t].exp().unsqueeze(-1) * state
        if beta is not None:
            value = beta[:, :, t] * (value - torch.einsum("bhkv,bhk->bhv", state, key))
        state = state + key.unsqueeze(-1) * value.unsqueeze(-2)
        out.append(torch.einsum("bhkv,bhk->bhv", state, q[:, :, t]))
    return (torch.stack(out, 2) if out else v * q.sum(-1, keepdim=True)), state
