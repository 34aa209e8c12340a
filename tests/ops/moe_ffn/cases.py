"""Inputs of ``gatecc::moe_ffn`` for the tests, and its definition written out slot by slot."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BY_HAND: dict[str, Any] = {
    "identity": lambda x: x,
    "relu": lambda x: x.clamp_min(0),
    "relu2": lambda x: x.clamp_min(0) ** 2,
    "silu": lambda x: x / (1 + (-x).exp()),
    "gelu": lambda x: x * (1 + torch.erf(x / 2**0.5)) / 2,
    "gelu(tanh)": lambda x: x * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (x + 0.044715 * x**3))) / 2,
    "quick_gelu": lambda x: x / (1 + (-1.702 * x).exp()),
    "tanh": lambda x: 1 - 2 / (1 + (2 * x).exp()),
    "sigmoid": lambda x: 1 / (1 + (-x).exp()),
    "mish": lambda x: x * torch.tanh(torch.log1p(x.exp())),
    "softplus": lambda x: torch.log1p(x.exp()),
    "hardswish": lambda x: x * (x + 3).clamp(0, 6) / 6,
    "relu6": lambda x: x.clamp(0, 6),
    "leaky_relu": lambda x: torch.where(x > 0, x, 0.01 * x),
    "leaky_relu(slope=0.2)": lambda x: torch.where(x > 0, x, 0.2 * x),
    "elu": lambda x: torch.where(x > 0, x, x.exp() - 1),
    "elu(alpha=0.5)": lambda x: torch.where(x > 0, x, 0.5 * (x.exp() - 1)),
    "selu": F.selu,
}


def operands(
    T: int = 7, d: int = 6, width: int = 5, E: int = 4, k: int = 2, o: int = 0, *, biased: bool = False, **options: Any
) -> dict[str, Any]:
    """The arguments of a call in float64, one slot in five empty; ``width`` is F, ``o`` the outputs if not d."""
    rows = width * (1 if options.get("layout") == "plain" else 2)
    found: dict[str, Any] = {
        "x": torch.randn(T, d),
        "weights": torch.rand(T, k),
        "indices": torch.where(torch.rand(T, k) < 0.2, E, torch.randint(E, (T, k))),
        "gate_up": torch.randn(E, rows, d) * d**-0.5,
        "down": torch.randn(E, o or d, width) * width**-0.5,
        "gate_up_bias": torch.randn(E, rows) if biased else None,
        "down_bias": torch.randn(E, o or d) if biased else None,
    }
    return {**to(found, torch.float64), **options}


def by_hand(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    combine: str = "sum",
) -> Tensor:
    """The definition, a slot at a time."""
    E, rows, _ = gate_up.shape
    slots = [[x.new_zeros(down.size(1)) for _ in row] for row in weights]
    for t, row in enumerate(indices.tolist()):
        for j, e in enumerate(row):
            if e == E:
                continue
            h = gate_up[e] @ x[t] + (0 if gate_up_bias is None else gate_up_bias[e])
            if layout == "plain":
                a = BY_HAND[activation](h)
            else:
                gate, up = (h[: rows // 2], h[rows // 2 :]) if layout == "halves" else (h[0::2], h[1::2])
                a = oss(gate, up) if activation == "swiglu" else BY_HAND[activation](gate) * up
            y = down[e] @ a + (0 if down_bias is None else down_bias[e])
            slots[t][j] = weights[t, j] * y
    stacked = torch.stack([torch.stack(row) for row in slots])
    return stacked.sum(1) if combine == "sum" else stacked


def oss(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss."""
    gate, up = gate.clamp(max=7.0), up.clamp(-7.0, 7.0)
    return (up + 1) * gate / (1 + (-1.702 * gate).exp())


def to(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same in another dtype."""
    return {n: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for n, v in given.items()}


def leaves(given: dict[str, Any]) -> dict[str, Any]:
    """The same, with a gradient for every floating-point tensor."""
    return {
        n: v.detach().clone().requires_grad_() if isinstance(v, Tensor) and v.is_floating_point() else v
        for n, v in given.items()
    }


def wanted(given: dict[str, Any]) -> list[Tensor]:
    """Those of ``leaves``."""
    return [v for v in given.values() if isinstance(v, Tensor) and v.requires_grad]
