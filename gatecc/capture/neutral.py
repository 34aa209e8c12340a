"""Neutral: ordinary tensors in the place of those that belong to the caller's state: inference mode, functorch, shards.

A capture reads no values and a proof any values, so that what a rank holds stands for what all ranks hold: no rank
needs another one to learn a call.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.autograd import forward_ad

functorch: Any = cast("Any", torch._C)._functorch  # torch has no types for it


def neutral(x: torch.Tensor) -> torch.Tensor:
    """The ordinary tensor behind one of inference mode (a copy), of functorch (of a batch the first) or with a tangent.

    Other tensors come back as they are.
    """
    plain, trained = x, x.requires_grad
    while functorch.is_functorch_wrapped_tensor(plain):
        axis = functorch.maybe_get_bdim(plain) if functorch.is_batchedtensor(plain) else -1
        plain = functorch.get_unwrapped(plain)
        trained = trained or plain.requires_grad
        plain = plain if axis < 0 else plain.select(axis, 0)
    if plain.is_inference():
        plain = plain.clone()
    elif plain is not x or _has_tangent(plain):
        plain = plain.detach()
    return x if plain is x else plain.requires_grad_(trained and plain.is_floating_point())


def is_shard(tensor: Any) -> bool:
    """Whether a tensor is a DTensor (recognised by name, so that torch.distributed need not be imported)."""
    return any(c.__name__ == "DTensor" and c.__module__.startswith("torch.distributed.") for c in type(tensor).__mro__)


def _repeated(x: Any) -> torch.Tensor:
    """A tensor of the size of the whole, made of what this rank has of it."""
    local: torch.Tensor = x._local_tensor.detach()
    whole = local.new_zeros(x.shape)
    if local.numel():
        times = [-(-size // mine) for size, mine in zip(x.shape, local.shape, strict=True)]
        whole.copy_(local.repeat(times)[tuple(map(slice, x.shape))])
    return whole


def _drawn(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Values for a weight that was never loaded, because a rewrite has taken it out of the layer."""
    made = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)) * max(x.shape[-1:], default=1) ** -0.5
    return made.to(device=device, dtype=x.dtype)


def _has_tangent(x: torch.Tensor) -> bool:
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None


@contextmanager
def neutral_weights(module: nn.Module) -> Generator[None]:
    """A module with `neutral` parameters and buffers, whole ones where this rank holds shards. Plain tensors that
    functional_call has put in the place of parameters are parameters meanwhile: torch.export takes no others."""
    swapped: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}  # tied weights stay tied
    device = next((p.device for p in module.parameters() if not p.is_meta), None)
    try:
        for m in module.modules():
            for table in (m._parameters, m._buffers):
                for name, tensor in list(table.items()):
                    if tensor is None:
                        continue
                    plain = made.setdefault(id(tensor), _weight(tensor, table is m._parameters, device))
                    if plain is not tensor:
                        swapped.append((table, name, tensor))
                        table[name] = plain  # pyright: ignore[reportArgumentType]
        yield
    finally:
        for table, name, tensor in swapped:
            table[name] = tensor


def _weight(tensor: torch.Tensor, parameter: bool, device: torch.device | None) -> torch.Tensor:
    """``device``: where the module's weights are that hold something."""
    plain = _repeated(cast("Any", tensor)) if is_shard(tensor) else neutral(tensor)
    if plain.is_meta and device is not None:
        plain = _drawn(plain, device)
    if not parameter or isinstance(plain, nn.Parameter):
        return plain
    trained = tensor.requires_grad or functorch.is_functorch_wrapped_tensor(tensor)
    return nn.Parameter(plain.detach(), requires_grad=trained and plain.is_floating_point())
