"""By what the judge tries the kernels of experts."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.family import Exemption, Family
from gatecc.ops.moe_ffn.arguments import arguments
from gatecc.ops.moe_ffn.kernels import KERNELS
from gatecc.ops.moe_ffn.operator import moe_ffn
from gatecc.ops.moe_ffn.triton.dispatch import LAUNCHER, GpuKernels

Call = dict[str, Any]
LOADS = {"few": 8, "some": 128, "many": 1024}  # tokens, two slots each, of eight experts


def _call(T: int, d: int, F: int, E: int, k: int, *, biased: bool = False, **options: Any) -> Call:
    """A call in float64, one slot in five empty."""
    rows = F * (1 if options.get("layout") == "plain" else 2)
    found: Call = {
        "x": torch.randn(T, d),
        "weights": torch.rand(T, k),
        "gate_up": torch.randn(E, rows, d) * d**-0.5,
        "down": torch.randn(E, d, F) * F**-0.5,
        "gate_up_bias": torch.randn(E, rows) if biased else None,
        "down_bias": torch.randn(E, d) if biased else None,
    }
    found = {name: None if x is None else x.double() for name, x in found.items()}
    indices = torch.where(torch.rand(T, k) < 0.2, E, torch.randint(E, (T, k)))
    return {**found, "indices": indices, **options}


def _run(given: Call, kernels: dict[str, Any]) -> dict[str, Tensor]:
    """The result, with and without gradients kept, and every gradient."""
    leaves = {n: x.clone().requires_grad_() if _floating(x) else x for n, x in given.items()}
    with patch.dict(KERNELS, kernels, clear=True):
        y = moe_ffn(**leaves)
        direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        wanted = {n: x for n, x in leaves.items() if _floating(x)}
        grads = torch.autograd.grad(y, list(wanted.values()), direction)
        with torch.no_grad():
            plain = moe_ffn(**given)
    return {"y": y.detach(), "y without gradients": plain, **dict(zip(wanted, grads, strict=True))}


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def start(tokens: int, dtype: torch.dtype, **options: str) -> None:
    """Forward, with and without gradients, and backward: two slots per token, eight experts of 1024 x 2816."""

    def on_meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    d, F, E = 1024, 2816, 8
    given = (on_meta(tokens, d), on_meta(tokens, 2, of=torch.float32), on_meta(tokens, 2, of=torch.int64))
    a = arguments(*given, on_meta(E, 2 * F, d), on_meta(E, d, F), on_meta(E, 2 * F), on_meta(E, d), **options)
    launch: Any = LAUNCHER.module()
    launch.forward(a, keep=False)
    launch.forward(a, keep=True)
    launch.backward(a, on_meta(tokens, d), on_meta(2 * tokens, 2 * F), [True] * 6)


FAMILY = Family(
    name="moe_ffn",
    launcher=LAUNCHER.name,
    cases={
        "few rows": partial(_call, 7, 20, 24, 5, 2, biased=True),
        "some rows": partial(_call, 50, 40, 70, 2, 1, layout="interleaved", activation="swiglu", biased=True),
        "many rows": partial(_call, 96, 16, 16, 1, 2, activation="gelu"),
        "slots": partial(_call, 9, 24, 40, 4, 3, layout="plain", activation="relu2", combine="slots"),
    },
    run=partial(_run, kernels=dict.fromkeys(("cpu", "cuda"), GpuKernels())),
    reference=partial(_run, kernels={}),
    sizes={load: partial(start, tokens) for load, tokens in LOADS.items()},
    exemptions=(
        Exemption("activate", "traffic", 1.5, "a block of rows reads the matrices again, one of columns the rows"),
    ),
)
