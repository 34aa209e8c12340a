"""GPU kernels of ``gatecc::attention``: which calls they take, and why they decline the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.launcher import TYPES, Launcher
from gatecc.ops.attention import kernels
from gatecc.ops.attention.arguments import Arguments
from gatecc.ops.attention.kernels import Gradients
from gatecc.ops.attention.triton.lists import BlockMap
from gatecc.ops.attention.triton.tables import LARGEST

LAUNCHER = Launcher("gatecc.ops.attention.triton.launch", "attention runs")
_FURTHEST = 2**31  # elements of one head from first to last: places in it are numbers of 32 bits


class GpuKernels:
    """Serves float32, bfloat16 and float16 on a GPU: every option of the operator."""

    def forward(self, a: Arguments) -> tuple[Tensor, Tensor] | None:
        """See gatecc.ops.attention.kernels.Kernels."""
        return _run(a, "forward", a)

    def backward(
        self,
        a: Arguments,
        out: Tensor,
        logsumexp: Tensor,
        grad: Tensor,
        grad_logsumexp: Tensor | None,
        needs: Sequence[bool],
    ) -> Gradients | None:
        """See gatecc.ops.attention.kernels.Kernels."""
        return _run(a, "backward", a, out, logsumexp, grad, grad_logsumexp, needs)


def refusal(a: Arguments) -> str | None:
    """Why the kernels do not take a call; None if they do."""
    if a.q.dtype not in TYPES:
        return f"{a.q.dtype} has no kernel"
    if not a.q.numel() or not a.v.numel():
        return "a call without queries, keys or channels has no kernel"
    widest = max(a.q.size(3), a.v.size(3))
    if widest > LARGEST:
        return f"heads of {widest} channels have no kernel ({LARGEST} at most)"
    for name, x in (("gate", a.gate), ("bias", a.bias), ("sinks", a.sinks)):
        if x is not None and x.dtype not in (*TYPES, torch.bool):
            return f"a {name} of {x.dtype} has no kernel"
    if a.blocks is not None and (reason := BlockMap.of(a.blocks, a.block_sizes).refusal):
        return reason
    furthest = max(_span(x) for x in (a.q, a.k, a.v, a.gate) if x is not None)
    if furthest >= _FURTHEST:
        return f"a head that spans {furthest} elements has no kernel (fewer than {_FURTHEST})"
    return LAUNCHER.missing(a.q.device)


def _span(x: Tensor) -> int:
    """From the first element of a head to its last."""
    return sum((n - 1) * stride for n, stride in zip(x.shape[2:], x.stride()[2:], strict=True))


def _run(a: Arguments, name: str, *given: Any) -> Any:
    quiet = a.q.dtype == torch.float64 or not a.q.numel()  # float64 is for checking, in ATen on every device
    return LAUNCHER.run(name, refusal(a), *given, quiet=quiet)


kernels.register("cuda", GpuKernels())
