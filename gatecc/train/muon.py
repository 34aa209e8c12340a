"""Muon for the machine at hand: torch's own, and on a CPU that has no arithmetic in bfloat16 the same in float32.

torch.optim.Muon orthogonalises in bfloat16. A CPU without units for it emulates them: an orthogonalisation then takes
up to a hundred times as long as in float32, many times the rest of a training step.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import _adjust_lr

_SIZE = 128  # of the matrices that are multiplied to see; emulated, a product takes a millisecond
_SLOW = 2.0  # bfloat16 of the CPU's own takes no longer than float32, emulated it takes 3 to 30 times as long


class Muon(torch.optim.Muon):
    """torch.optim.Muon, its state and its arithmetic, but for the dtype of the orthogonalisation on some CPUs.

    Muon: An optimizer for hidden layers in neural networks (Jordan et al. 2024).
    """

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One update of every matrix that has a gradient."""
        cpu = any(p.device.type == "cpu" for group in self.param_groups for p in group["params"])
        if not cpu or not bfloat16_is_slow():
            return super().step(closure)
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            self._update(group)
        return loss

    @torch.no_grad()
    def _update(self, group: dict[str, Any]) -> None:
        matrices: list[Tensor] = []
        gradients: list[Tensor] = []
        buffers: list[Tensor] = []
        self._init_group(group, matrices, gradients, buffers)
        lr = float(group["lr"])
        for matrix, gradient, buffer in zip(matrices, gradients, buffers, strict=True):
            buffer.lerp_(gradient, 1 - group["momentum"])
            update = gradient.lerp(buffer, group["momentum"]) if group["nesterov"] else buffer
            update = orthogonal(update.float(), group["ns_coefficients"], group["ns_steps"], group["eps"])
            matrix.mul_(1 - lr * group["weight_decay"])
            matrix.add_(update.to(matrix.dtype), alpha=-_adjust_lr(lr, group["adjust_lr_fn"], matrix.shape))


def orthogonal(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """The Newton-Schulz iteration of torch.optim.Muon on a matrix, in its own dtype: singular values near 1."""
    a, b, c = coefficients
    wide = x.mT if x.size(0) > x.size(1) else x
    wide = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = wide @ wide.mT
        wide = torch.addmm(wide, torch.addmm(gram, gram, gram, beta=b, alpha=c), wide, beta=a)
    return wide.mT if x.size(0) > x.size(1) else wide


@functools.cache
def bfloat16_is_slow() -> bool:
    """Whether this CPU multiplies matrices of bfloat16 much slower than of float32: measured once, in milliseconds."""
    narrow, wide = (_seconds(dtype) for dtype in (torch.bfloat16, torch.float32))
    return narrow > _SLOW * wide


def _seconds(dtype: torch.dtype) -> float:
    """The shortest time of some products; the first ones warm up."""
    x = torch.ones(_SIZE, _SIZE, dtype=dtype)
    took: list[float] = []
    with torch.no_grad():
        for _ in range(8):
            clock = time.perf_counter()
            torch.addmm(x, x, x)
            took.append(time.perf_counter() - clock)
    return min(took)
