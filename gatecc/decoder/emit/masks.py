"""The causal mask that a fused attention makes of its own, for a step: aligned to the newest position."""

from __future__ import annotations

import torch


def triangle(past: int, new: int, start: int, like: torch.Tensor) -> torch.Tensor:
    """Which of the keys start .. past+new the positions past .. past+new see. -> (new, past + new - start) bool"""
    queries = torch.arange(past, past + new, device=like.device).unsqueeze(1)
    return torch.arange(start, past + new, device=like.device) <= queries
