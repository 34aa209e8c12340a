"""Packed rows: several sequences behind each other in one row of the batch, none of which may see another.

The mask that a mixer takes is (B, N): booleans, False at padding, where a row holds one sequence; or integers, 0 at
padding, else the number of the token's sequence, ascending (`gatecc.ops.sequences`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def kept(mask: Tensor | None) -> Tensor | None:
    """(B, N), False at padding."""
    return mask if mask is None or mask.dtype == torch.bool else mask > 0


def is_packed(mask: Tensor | None) -> bool:
    """Whether rows may hold several sequences."""
    return mask is not None and mask.dtype != torch.bool


def forgetting(decay: Tensor | None, mask: Tensor | None, *, reverse: bool = False) -> Tensor | None:
    """The log decay of a recurrence, -inf where a sequence begins (ends, if it runs in reverse): all is forgotten.

    decay: (B or 1, H, N or 1, Dk or 1), None for 0; logits of gates as well.
    """
    if mask is None or mask.dtype == torch.bool:
        return decay
    first = (first_tokens(mask.flip(-1)).flip(-1) if reverse else first_tokens(mask))[:, None, :, None]
    if decay is None:
        return torch.zeros_like(first, dtype=torch.float32).masked_fill(first, -torch.inf)
    return torch.where(first, -torch.inf, decay)


def first_tokens(mask: Tensor) -> Tensor:
    """(B, N), True at the first token of each sequence. Sequences may be numbered up or down."""
    at = torch.arange(mask.size(1), device=mask.device)
    last = torch.where(mask > 0, at, -1).cummax(-1).values
    before = F.pad(last[:, :-1], [1, 0], value=-1)
    same = mask.gather(1, before.clamp_min(0)) == mask
    return (mask > 0) & ~(same & (before >= 0))


def together(mask: Tensor) -> Tensor:
    """(B, 1, N, N), True where two tokens belong to one sequence, or where the key is no padding (for booleans)."""
    if mask.dtype == torch.bool:
        return mask[:, None, None, :]
    return (mask[:, None, :, None] == mask[:, None, None, :]) & (mask > 0)[:, None, None, :]


def delayed(mask: Tensor, tokens: int) -> Tensor:
    """(B, N), True where the token ``tokens`` places earlier exists and belongs to the same sequence."""
    return F.pad(mask, [tokens, 0])[:, : mask.size(1)] == mask if tokens else mask > 0


def causal_convolution(x: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None) -> Tensor:
    """A depthwise convolution over tokens that sees no later one, and none of another sequence.

    x: (B, C, N), weight: (C, 1, taps) -> (B, C, N). Padding should be zero in x.
    """
    taps = weight.size(-1)
    if mask is None or mask.dtype == torch.bool:
        return F.conv1d(F.pad(x, (taps - 1, 0)), weight, bias, groups=weight.size(0))
    y = x * weight[:, :, -1]
    for back in range(1, taps):
        earlier = F.pad(x, (back, 0))[..., : x.size(-1)] * delayed(mask, back).unsqueeze(1)
        y = y + earlier * weight[:, :, taps - 1 - back]
    return y if bias is None else y + bias.unsqueeze(-1)
