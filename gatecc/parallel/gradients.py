"""Gradient norms where some parameters are sharded and others are not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def clip_grad_norm_(parameters: Iterable[nn.Parameter], most: float) -> Tensor:
    """Scale gradients so that their norm over all parameters, whole ones, is at most ``most``; returns the norm.

    ``torch.nn.utils.clip_grad_norm_`` takes no parameters of several meshes. A collective: every rank calls it.
    """
    grads = [p.grad for p in parameters if p.grad is not None]
    kinds: dict[Any, list[Tensor]] = {}
    for grad in grads:
        kind = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else None
        kinds.setdefault(kind, []).append(grad)
    norms = [_whole(torch.nn.utils.get_total_norm(of_kind)) for of_kind in kinds.values()]
    total = torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
    for of_kind in kinds.values():
        for grad in of_kind:
            grad.mul_((most / (total + 1e-6)).clamp(max=1.0).to(grad.device))
    return total


def _whole(norm: Tensor) -> Tensor:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm
