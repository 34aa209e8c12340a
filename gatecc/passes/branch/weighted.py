"""weighted_sum: of adapters that are two matrices with something pointwise between them; all, or the chosen ones."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc import ops as ops  # registers the operator

ACTIVATIONS = {"identity": lambda h: h, "silu": F.silu, "gelu": F.gelu, "relu": F.relu, "tanh": torch.tanh}


def weighted_sum(
    x: Tensor,
    weights: Tensor,
    indices: Tensor | None,
    first: Tensor,
    second: Tensor,
    activation: str = "identity",
    gated: bool = False,
) -> Tensor:
    """sum_e w_e * second_e^T f(first_e x). x: (..., C) -> (..., O).

    first: (E, F, C), or (E, 2F, C) if ``gated``: f(h) = activation(h[:F]) * h[F:]. second: (E, F, O).
    Without indices, weights (..., E) are of all experts: two products with the stacked matrices, which beats any
    sorting. With indices, weights and they are (T, k), T the number of positions: the others cost nothing.
    """
    experts = first.size(0)
    if indices is not None and indices.size(-1) == experts:  # all of them, in any order
        slots = F.one_hot(indices, experts + 1)[..., :experts]  # index E is an empty slot
        weights = (weights.unsqueeze(-1) * slots).sum(-2).view(*x.shape[:-1], experts)
        indices = None
    if indices is not None:
        layout = "halves" if gated else "plain"
        tokens = x.reshape(-1, x.size(-1))
        options = {"activation": activation, "layout": layout}
        y = torch.ops.gatecc.moe_ffn(tokens, weights, indices, first, second.transpose(1, 2), **options)
        return y.view(*x.shape[:-1], y.size(-1))
    h = F.linear(x, first.flatten(0, 1)).unflatten(-1, (experts, -1))
    if gated:
        g, h = h.chunk(2, -1)
        h = ACTIVATIONS[activation](g) * h
    else:
        h = ACTIVATIONS[activation](h)
    h = h * weights.unsqueeze(-1).to(h.dtype)
    return h.flatten(-2) @ second.flatten(0, 1)
