"""By what the judge tries the kernels of attention."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.family import Exemption, Family
from gatecc.ops.attention.arguments import arguments
from gatecc.ops.attention.kernels import KERNELS
from gatecc.ops.attention.operator import attention
from gatecc.ops.attention.triton.dispatch import LAUNCHER, GpuKernels

Call = dict[str, Any]
Shape = tuple[int, ...]


def _call(
    H: int,
    G: int,
    N: int,
    S: int,
    D: int,
    E: int,
    *,
    gate: int = 0,
    bias: Shape = (),
    seen: Shape = (),
    sinks: bool = False,
    blocks: Shape = (),
    **options: Any,
) -> Call:
    """A call of one sequence (two with blocks) in float64. gate: its channels; seen, blocks: True in a half."""
    B = 2 if blocks else 1
    found: Call = {
        "q": torch.randn(B, H, N, D),
        "k": torch.randn(B, G, S, D),
        "v": torch.randn(B, G, S, E),
        "gate": torch.randn(B, H, N, gate) if gate else None,
        "bias": torch.randn(bias) if bias else None,
        "sinks": torch.randn(H) if sinks else None,
    }
    found = {name: None if x is None else x.double() for name, x in found.items()}
    if seen:
        found["bias"] = torch.rand(seen) < 0.5
    if blocks:
        found["blocks"] = torch.rand(blocks) < 0.5
    return {**found, **options}


def _run(given: Call, kernels: dict[str, Any]) -> dict[str, Tensor]:
    """Results and every gradient."""
    leaves = {n: x.clone().requires_grad_() if _floating(x) else x for n, x in given.items()}
    with patch.dict(KERNELS, kernels, clear=True):
        out, logsumexp = attention(**leaves)
        sees = logsumexp > -torch.inf
        direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64, device=out.device).view(out.shape)
        loss = (out * direction.to(out.dtype)).sum() + torch.where(sees, logsumexp, 0.0).square().sum()
        wanted = {n: x for n, x in leaves.items() if _floating(x)}
        grads = torch.autograd.grad(loss, list(wanted.values()))
    found = {"out": out, "logsumexp": torch.where(sees, logsumexp, 0.0), **dict(zip(wanted, grads, strict=True))}
    return {name: x.detach() for name, x in found.items()}


def _floating(x: Any) -> bool:
    return isinstance(x, Tensor) and x.is_floating_point()


def start(D: int, dtype: torch.dtype, *, queries: int = 2048, values: int = 0, few: bool = False, **given: Any) -> None:
    """Forward, and unless ``few`` backward: 16 heads, four of 2048 keys, causal, gated, with sinks."""

    def on_meta(*shape: int, of: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=of, device="meta")

    H, G, N, S, E = 16, 4, queries, 2048, values or D
    bias, blocks = given.pop("bias", ()), given.pop("blocks", ())
    q, k, v, gate = on_meta(1, H, N, D), on_meta(1, G, S, D), on_meta(1, G, S, E), on_meta(1, H, N, E)
    options: dict[str, Any] = {"causal": True, "gate_activation": "sigmoid", **given}
    if blocks:
        options["blocks"] = on_meta(*blocks, of=torch.bool)
    a = arguments(q, k, v, gate, on_meta(*bias) if bias else None, on_meta(H), **options)
    launch: Any = LAUNCHER.module()
    out, logsumexp = launch.forward(a)
    if not few:
        launch.backward(a, out, logsumexp, on_meta(1, H, N, E), None, [True] * 6)


_KEYS_AGAIN = "each block of queries reads keys and values, each block of keys the queries: from the L2 cache, on a GPU"
_WIDE = "256 channels in float32, each in two parts for TF32, fill the registers at the smallest blocks that there are"
_ROUNDED = "weights are computed again, from a logsumexp that was rounded to float32"
CASES = {
    "causal, gate": partial(_call, 2, 2, 40, 40, 16, 16, gate=16, causal=True, gate_activation="sigmoid"),
    "window, sinks, groups": partial(
        _call, 4, 2, 50, 70, 20, 24, gate=1, sinks=True, causal=True, window=19, gate_activation="silu"
    ),
    "bias, cap": partial(_call, 2, 1, 33, 37, 16, 40, bias=(1, 2, 33, 37), softcap=2.0),
    "bias of keys": partial(_call, 4, 1, 33, 37, 16, 16, bias=(1, 4, 1, 37), causal=True),
    "mask": partial(_call, 2, 2, 33, 37, 16, 16, seen=(1, 1, 33, 37)),
    "one query": partial(_call, 4, 1, 1, 100, 24, 16, gate=16, sinks=True, causal=True, window=80),
    "blocks": partial(_call, 2, 1, 40, 70, 16, 16, blocks=(2, 2, 3, 3), block_sizes=(16, 32), causal=True, gate=16),
    "blocks of one query": partial(
        _call, 2, 1, 1, 100, 16, 16, blocks=(1, 1, 1, 4), block_sizes=(1, 32), bias=(1, 2, 1, 100)
    ),
}
SIZES: dict[str, Any] = {
    **{f"D={D}": partial(start, D) for D in (64, 128, 256)},
    **{f"one query, D={D}": partial(start, D, queries=1, few=True) for D in (64, 128, 256)},
    "bias, cap, window, D=80, E=64": partial(start, 80, values=64, bias=(1, 16, 2048, 2048), softcap=30.0, window=512),
    "blocks, D=64": partial(start, 64, blocks=(1, 16, 16, 16), block_sizes=[128, 128]),
    "blocks of one query, D=128": partial(start, 128, queries=1, few=True, blocks=(1, 1, 1, 16), block_sizes=[1, 128]),
}
FAMILY = Family(
    name="attention",
    launcher=LAUNCHER.name,
    cases=CASES,
    run=partial(_run, kernels=dict.fromkeys(("cpu", "cuda"), GpuKernels())),
    reference=partial(_run, kernels={}),
    sizes=SIZES,
    exemptions=(
        *(
            Exemption(kernel, "traffic", most, _KEYS_AGAIN)
            for kernel, most in {
                "attend": 3.5,
                "attend_part": 1.6,
                "differentiate_queries": 4,
                "differentiate_keys": 2.5,
                "differentiate_bias": 4.5,
            }.items()
        ),
        *(
            Exemption(kernel, "spills", 300, _WIDE, ("fp32",), ("D=256",), ("sm_",))
            for kernel in ("differentiate_queries", "differentiate_keys")
        ),
        *(Exemption(case, "error", 4, _ROUNDED, dtypes=("fp32",)) for case in CASES),
    ),
)
