"""Stamps: whether a tensor holds what it held, as far as it can be seen without reading all of it.

A write that autograd can see counts up the tensor's version; another storage (``tensor.data = ...``) lies at another
address. A write through ``tensor.data`` shows in neither: on a CPU it is looked for in the elements, all of a small
tensor and a sample of a large one. On an accelerator that would make each call wait, and it is not found.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch

SMALL = 8192  # elements, up to which all are compared
SAMPLE = 509  # elements of a larger tensor that are compared; a prime, so that it walks through rows and columns


@dataclass(frozen=True, eq=False)
class Stamp:
    """A tensor as it was. One of inference mode has no version and no stamp."""

    tensor: weakref.ref[torch.Tensor]
    place: tuple[int, int]
    sample: tuple[torch.Tensor, torch.Tensor] | None  # a view of it, and what that held

    @staticmethod
    def of(tensor: torch.Tensor) -> Stamp:
        """The stamp of now."""
        view = _sample(tensor) if tensor.device.type == "cpu" else None
        return Stamp(weakref.ref(tensor), _place(tensor), None if view is None else (view, view.clone()))

    def holds(self, tensor: torch.Tensor) -> bool:
        """Whether nothing has changed."""
        same = self.tensor() is tensor and self.place == _place(tensor)
        return same and (self.sample is None or torch.equal(*self.sample))


def _place(tensor: torch.Tensor) -> tuple[int, int]:
    return tensor.data_ptr(), tensor._version


def _sample(tensor: torch.Tensor) -> torch.Tensor:
    """Some elements of a tensor, as a view of its storage."""
    as_it_lies = sorted(range(tensor.dim()), key=tensor.stride, reverse=True)
    view = tensor.detach().permute(as_it_lies)
    if view.numel() <= SMALL:
        return view
    if view.is_contiguous():
        flat = view.view(-1)
        return flat[:: (flat.numel() // SAMPLE) | 1]
    for axis, size in enumerate(view.shape):  # it has gaps: the longest axes are walked through in steps
        step = min(size, -(-view.numel() // SMALL))
        view = view[(slice(None),) * axis + (slice(None, None, step | 1),)]
    return view
