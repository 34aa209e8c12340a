"""By what the judge tries the kernels of short convolutions."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.family import Exemption, Family
from gatecc.ops.short_convolution.arguments import Arguments
from gatecc.ops.short_convolution.kernels import KERNELS
from gatecc.ops.short_convolution.operator import short_convolution
from gatecc.ops.short_convolution.triton.dispatch import LAUNCHER, GpuKernels

Call = dict[str, Any]


def _call(B: int, N: int, C: int, K: int, activation: str = "silu", *, bias: bool = True, state: bool = False) -> Call:
    """Operands in float64; x is a part of a projection."""
    draw = partial(torch.randn, dtype=torch.float64)
    found: Call = {"x": draw(B, N, 2 * C)[..., C:], "weight": draw(C, 1, K), "activation": activation}
    found |= {"bias": draw(C)} if bias else {}
    return found | ({"state": draw(B, K - 1, C)} if state else {})


def _run(given: Call, kernels: dict[str, Any]) -> dict[str, Tensor]:
    """Results and every gradient."""
    leaves: Call = {n: x.clone().requires_grad_() if isinstance(x, Tensor) else x for n, x in given.items()}
    wanted = {n: x for n, x in leaves.items() if isinstance(x, Tensor)}
    with patch.dict(KERNELS, kernels, clear=True):
        y, after = short_convolution(**leaves)
        direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
        loss = (y * direction).sum() + after.square().sum()
        grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"y": y.detach(), "after": after.detach(), **dict(zip(wanted, grads, strict=True))}


def _on_meta(dtype: torch.dtype, tokens: int) -> tuple[Arguments, Any]:
    draw = partial(torch.empty, device="meta", dtype=dtype)
    tensors = (draw(8, tokens, 2048), draw(2048, 1, 4), draw(2048), draw(8, 3, 2048))
    return Arguments(*tensors, "silu"), LAUNCHER.module()


def _start(dtype: torch.dtype) -> None:
    """Forward and backward of 8 samples of 2048 tokens and channels."""
    a, launch = _on_meta(dtype, 2048)
    launch.forward(a)
    launch.backward(a, torch.empty(a.x.shape, device="meta", dtype=dtype), [True] * 4)


def _start_step(dtype: torch.dtype) -> None:
    """One token of each of 8 samples."""
    a, launch = _on_meta(dtype, 1)
    launch.forward(a)


_TAPS = "each tap reads the rows of its tokens: all but the first from the cache, on a GPU"
FAMILY = Family(
    name="short_convolution",
    launcher=LAUNCHER.name,
    cases={
        "plain": partial(_call, 2, 37, 20, 4, "identity", bias=False),
        "silu": partial(_call, 1, 70, 24, 4),
        "a state, fewer tokens than taps": partial(_call, 3, 2, 40, 4, state=True),
        "one token": partial(_call, 2, 1, 70, 3, state=True),
        "many taps": partial(_call, 1, 33, 16, 8, state=True),
    },
    run=partial(_run, kernels=dict.fromkeys(("cpu", "cuda"), GpuKernels())),
    reference=partial(_run, kernels={}),
    sizes={"2048 tokens": _start, "one token": _start_step},
    exemptions=(
        Exemption("convolve", "traffic", 8, _TAPS),
        Exemption("differentiate", "traffic", 8, _TAPS),
        Exemption("spread", "traffic", 8, _TAPS),
    ),
)
