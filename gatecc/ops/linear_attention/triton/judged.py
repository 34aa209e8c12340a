"""By what the judge tries the kernels of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.judge.family import Exemption, Family
from gatecc.ops.linear_attention.arguments import arguments
from gatecc.ops.linear_attention.kernels import KERNELS
from gatecc.ops.linear_attention.operator import linear_attention
from gatecc.ops.linear_attention.problem import prepare
from gatecc.ops.linear_attention.triton.dispatch import LAUNCHER, GpuKernels

Call = dict[str, Any]


def _call(rule: str, H: int = 1, N: int = 40, Dk: int = 16, Dv: int = 16, **options: Any) -> Call:
    """Operands in float64: q, k, v and what the rule asks for."""
    q, k = (torch.randn(1, H, N, Dk, dtype=torch.float64) for _ in range(2))
    found: Call = {"q": q, "k": k, "v": torch.randn(1, H, N, Dv, dtype=torch.float64)}
    if "gated" in rule:
        found["log_decay"] = F.logsigmoid(torch.randn(1, H, N, Dk, dtype=torch.float64)) / 16
    if "delta" in rule:
        found |= {"k": F.normalize(k, dim=-1), "beta": torch.rand(1, H, N, dtype=torch.float64)}
    return {**found, **options}


def _joined(**options: Any) -> Call:
    """The heads of a token lie together."""
    given = _call("gated_delta", **options)
    return {n: x.transpose(1, 2).contiguous().transpose(1, 2) if x.dim() == 4 else x for n, x in given.items()}


def _packed() -> Call:
    edges = torch.tensor([0, 1, 64, 64, 97])
    return {**_call("gated", N=97, Dk=20, Dv=24), "cu_seqlens": edges, "reverse": True}


def _logits() -> Call:
    given = _call("gated", H=2, N=20)
    logits = 4 * torch.randn(1, 1, 20, 1, dtype=torch.float64)
    return {**given, "q": given["q"].abs(), "k": given["k"].abs(), "log_decay": logits} | {
        "gate_normalizer": 16.0,
        "normalize": True,
    }


def _run(given: Call, kernels: dict[str, Any]) -> dict[str, Tensor]:
    """Outputs and every gradient."""
    leaves = {n: x.clone().requires_grad_() if _floating(x) else x for n, x in given.items()}
    with patch.dict(KERNELS, kernels, clear=True):
        o, state = linear_attention(**leaves)
        direction = torch.linspace(-1, 1, o.numel(), dtype=torch.float64).view(o.shape).to(o.dtype)
        loss = (o * direction).sum() + state.square().sum()
        wanted = {n: x for n, x in leaves.items() if _floating(x)}
        grads = torch.autograd.grad(loss, list(wanted.values()))
    return {"o": o.detach(), "state": state.detach(), **dict(zip(wanted, grads, strict=True))}


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def start(rule: str, D: int, dtype: torch.dtype, *, per_head: bool = False) -> None:
    """Forward and backward of 16 heads of D channels over 2048 tokens."""

    def on_meta(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    decay = on_meta(1, 16, 2048, 1 if per_head else D) if "gated" in rule else None
    beta = on_meta(1, 16, 2048) if "delta" in rule else None
    q, k, v = (on_meta(1, 16, 2048, D) for _ in range(3))
    a = arguments(q, k, v, decay, beta, gate_normalizer=None if decay is None else 16.0)
    launch: Any = LAUNCHER.module()
    launch.forward(prepare(a))
    launch.backward(prepare(a), on_meta(1, 16, 2048, D), torch.empty(1, 16, D, D, device="meta"))


_SIZES: dict[str, Callable[[torch.dtype], object]] = {
    f"{rule}, D={D}": partial(start, rule, D) for rule in ("gated", "gated_delta", "linear") for D in (64, 128)
}

_TF32 = "16-bit inputs are multiplied in TF32, which resolves what float16 does, several times in a row"
# Each was tried: compiled in one part of TF32 instead of three, nothing spills, and registers are 180 or fewer.
_PARTS = "products in three parts of TF32 (tf32x3), which float32 asks for, hold each operand twice"
_WHOLE = f"{_PARTS}; a block holds all 128 keys of the state, and 16 values are the fewest that a product takes"
_HALVES = f"{_PARTS}; blocks of half as many values do not spill, and compute the weights of a chunk twice"
FAMILY = Family(
    name="linear_attention",
    launcher=LAUNCHER.name,
    cases={
        "linear": partial(_call, "linear", Dk=72),
        "gated": partial(_call, "gated"),
        "delta": partial(_call, "delta", H=2),
        "gated delta": partial(_joined, H=2, Dk=20, Dv=12),
        "packed, backwards": _packed,
        "logits": _logits,
    },
    run=partial(_run, kernels=dict.fromkeys(("cpu", "cuda"), GpuKernels())),
    reference=partial(_run, kernels={}),
    sizes=_SIZES,
    exemptions=(
        Exemption("delta_scan_backward", "spills", 4, _WHOLE, ("fp32",), ("gated_delta, D=128",), ("sm_90", "sm_100")),
        Exemption("scan", "spills", 2, _PARTS, ("fp32",), targets=("sm_100",)),
        Exemption("mix", "spills", 8, _HALVES, ("fp32",), ("linear, D=64", "linear, D=128"), ("sm_100",)),
        Exemption("differentiate", "traffic", 1.4, "a block of keys reads the values of its chunk again", ("fp32",)),
        Exemption("delta", "error", 2, _TF32, dtypes=("fp16",)),
        Exemption("gated delta", "error", 3, _TF32, dtypes=("fp16",)),
        Exemption("logits", "error", 3, _TF32, dtypes=("fp16",)),
        Exemption("logits", "error", 2, "o is rounded to bfloat16 before it is normalised", dtypes=("bf16",)),
    ),
)
