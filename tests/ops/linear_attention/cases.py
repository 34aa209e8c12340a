"""Inputs of linear attention for the tests, and the truth in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

RULES = ("linear", "gated", "delta", "gated_delta")


def decays(kind: str, *shape: int) -> Tensor:
    """Log decays of the table in issue 3: from mild to exactly 0 and exactly 1."""
    x = torch.randn(shape)
    strong = torch.rand(shape) < 0.1
    kinds = {
        "mild": F.logsigmoid(x) / 16,
        "-3": torch.full(shape, -3.0),
        "-12": torch.full(shape, -12.0),
        "mixed": torch.where(strong, -40.0, -0.01),
        "zero": torch.where(strong, -torch.inf, -0.01),
        "one": torch.zeros(shape),
    }
    return kinds[kind]


def operands(
    rule: str, B: int = 1, H: int = 2, N: int = 9, Dk: int = 16, Dv: int = 16, kind: str = "mild", **heads: int
) -> dict[str, Any]:
    """q, k, v and what the rule asks for; ``heads`` of k, v, log_decay or beta where they are fewer."""
    found: dict[str, Any] = {
        "q": torch.randn(B, H, N, Dk),
        "k": torch.randn(B, heads.get("k", H), N, Dk),
        "v": torch.randn(B, heads.get("v", H), N, Dv),
    }
    if "gated" in rule:
        found["log_decay"] = decays(kind, B, heads.get("log_decay", H), N, Dk)
    if "delta" in rule:
        found["k"] = F.normalize(found["k"], dim=-1)
        found["beta"] = torch.rand(B, heads.get("beta", H), N)
    return found


def double(given: dict[str, Any]) -> dict[str, Any]:
    """The same in float64."""
    return {name: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for name, x in given.items()}


def tokens_first(given: dict[str, Any]) -> dict[str, Any]:
    """The same where the heads of a token lie together, as views of (B, N, H, D)."""
    return {name: x.transpose(1, 2).contiguous().transpose(1, 2) for name, x in given.items()}


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with a gradient for every floating-point tensor."""
    return {
        name: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for name, x in given.items()
    }


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest value. NaN counts as infinite."""
    if not truth.numel():
        return 0.0 if found.shape == truth.shape else float("inf")
    found, truth = found.detach().double(), truth.detach()
    error = (found - truth).abs().max() / truth.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(nan=float("inf")))
