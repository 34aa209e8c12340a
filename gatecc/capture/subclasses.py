"""Weights that are tensors of another class (torchao's quantised ones, say): a graph is captured as with plain weights.

The classes stand for a plain tensor of their shape and dtype and know how to compute with it. For the time of a capture
plain tensors stand in their places, so that the graph holds the operators that the model calls; when it runs it reads
the live weights, and their class computes.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

import torch
from torch import nn

from gatecc.ir.weights import is_wrapped


@contextmanager
def plain_weights(module: nn.Module) -> Generator[None]:
    """Put plain parameters and buffers into the places of wrapped ones for a while; tied ones stay tied."""
    swapped: list[tuple[dict[str, torch.Tensor | None], str, torch.Tensor]] = []
    made: dict[int, torch.Tensor] = {}
    for child in module.modules():
        for held in (child._parameters, child._buffers):
            for name, tensor in held.items():
                if tensor is not None and is_wrapped(tensor):
                    swapped.append((held, name, tensor))  # pyright: ignore[reportArgumentType]
    for _, _, tensor in swapped:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
        made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
    try:
        for held, name, tensor in swapped:
            held[name] = made[id(tensor)]
        yield
    finally:
        for held, name, tensor in swapped:
            held[name] = tensor
