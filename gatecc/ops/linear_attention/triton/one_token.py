"""One token handed to its kernel: operands as they lie, whatever their strides, dtypes and numbers of heads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.sizes import cdiv
from gatecc.ops.linear_attention.triton.kernels.tokens import token
from gatecc.ops.linear_attention.triton.tables import blocks, operand


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    after: Tensor,
    scale: float,
    normalizer: float | None = None,
) -> Tensor | None:
    """o: (B, H, Dv), or (B, H, 1, Dv) if q has an axis for the token; fills ``after``. None if something does not fit.

    The arguments are those of gatecc.ops.linear_attention.kernels.Kernels.step. With a normalizer log_decay has logits.
    """
    B, H, Dk, Dv = state.shape
    q4, k4, v4 = (x if q.dim() == 4 else x.unsqueeze(2) for x in (q, k, v))
    decay = log_decay if log_decay is None or log_decay.dim() == 4 else log_decay.unsqueeze(2)
    strength = None if beta is None else beta.reshape(*beta.shape[:2], 1, 1)
    wide = None if decay is None else Dk if decay.size(-1) == Dk else 1
    fits = _fits(q4, B, H, Dk) and q4.size(1) == H and _fits(k4, B, H, Dk) and _fits(v4, B, H, Dv)
    if (
        not fits
        or not (decay is None or _fits(decay, B, H, wide))
        or not (strength is None or _fits(strength, B, H, 1))
    ):
        return None
    o = q.new_empty(*q4.shape[:3], Dv)
    block = blocks("token", q.dtype, Dk, Dv)
    operands = (operand(x, H) for x in (q4, k4, v4, decay, strength))
    sizes: dict[str, Any] = {"DK": Dk, "DV": Dv, "BK": block.keys, "BV": block.values}
    sizes["NORMALIZER"] = normalizer
    kernel: Any = token
    with torch.cuda.device_of(q):
        kernel[(B * H, cdiv(Dv, block.values))](
            *operands, state, after, operand(o, H), H, scale, **sizes, **block.options
        )
    return o if q.dim() == 4 else o.squeeze(2)


def _fits(x: Tensor, B: int, H: int, width: int | None) -> bool:
    heads = x.size(1) if x.dim() == 4 else 0
    return heads > 0 and H % heads == 0 and x.shape == (B, heads, 1, width)
