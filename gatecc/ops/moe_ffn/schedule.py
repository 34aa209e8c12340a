"""Which slots each expert serves: a stable sort by expert, so that an expert's rows lie together."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.errors import ArgumentError


class Schedule(NamedTuple):
    """order: (R,), the slots (token * k + place) that are not empty, by expert, then as they came.

    ``counts[e]`` of them are for expert e.
    """

    order: Tensor
    counts: list[int]

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """Expert, first row and number of rows, of experts that have any."""
        first = 0
        for expert, rows in enumerate(self.counts):
            if rows:
                yield expert, first, rows
                first += rows


def schedule(indices: Tensor, experts: int) -> Schedule:
    """The schedule of indices (T, k). Raises ArgumentError for an index that is neither an expert nor ``experts``."""
    flat = indices.reshape(-1)
    if not flat.numel():
        return Schedule(flat, [0] * experts)
    found, order = torch.sort(flat, stable=True)
    edges: list[int] = torch.searchsorted(found, torch.arange(-1, experts + 2, device=flat.device)).tolist()
    check_range(edges[1] == 0 and edges[-1] == flat.numel(), flat, experts)
    counts = [end - start for start, end in pairwise(edges[1:-1])]
    return Schedule(order[: sum(counts)], counts)


def check_range(fits: bool, indices: Tensor, experts: int) -> None:
    """Raise ArgumentError unless ``fits``."""
    if not fits:
        raise ArgumentError(
            "an index of moe_ffn is no expert",
            found=f"indices from {int(indices.min())} to {int(indices.max())}",
            expected=f"0 to {experts - 1}, or {experts} for a slot that is empty",
        )
