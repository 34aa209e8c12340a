"""Running a derived decoder in pieces, to compare it with the full forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.decoder import Decoder

PIECES = (7, 1, 1, 1, 1, 1, 3, 1)  # a prefill, single tokens, a chunk, a single one: 16 in all


def stepped(made: Decoder, ids: Tensor, pieces: Sequence[int] = PIECES, **values: Tensor) -> Tensor:
    """The logits of all tokens, computed piece by piece. ids: (B, N) -> (B, N, V)"""
    state = made.init_state(ids.shape[0])
    parts: list[Tensor] = []
    start = 0
    for piece in pieces:
        end = start + piece
        logits, state = made.prefill(ids[:, start:end], state, **{k: v[:, start:end] for k, v in values.items()})
        parts.append(logits)
        start = end
    return torch.cat(parts, 1)


def full(model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """The logits of one forward over everything."""
    with torch.no_grad():
        output = model(*args, **kwargs)
    return output if isinstance(output, Tensor) else output[0]


def difference(one: Tensor, other: Tensor) -> float:
    """The largest difference, relative to max(1, max|value|)."""
    return float((one - other).abs().max()) / max(1.0, float(one.abs().max()))
