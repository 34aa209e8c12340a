"""Some rows: a function of samples that runs for those alone that need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Rows = bool | slice | Tensor
"""Of a batch: all (True), none (False), those that follow one another, or the indices of some."""


def rows_of(condition: Tensor) -> Rows:
    """The samples for one of whose tokens a condition holds. condition: (B, 1, ...) or (B, N, 1) of bool"""
    if condition.numel() == 1:
        return bool(condition)
    some = condition if condition.numel() == condition.size(0) else condition.flatten(1).any(1)
    at = some.reshape(-1).nonzero().squeeze(1)
    count = at.numel()
    if count in (0, condition.size(0)):
        return bool(count)
    first = int(at[0])
    return slice(first, first + count) if int(at[-1]) - first == count - 1 else at


def count_of(rows: Rows, samples: int) -> int:
    """How many samples they are, of so many."""
    if isinstance(rows, bool):
        return samples if rows else 0
    return rows.stop - rows.start if isinstance(rows, slice) else rows.numel()


def on_rows(
    body: Callable[..., Tensor],
    axes: Sequence[int | None],
    rows: Rows,
    condition: Tensor,
    other: Tensor,
    given: Sequence[Any],
) -> Tensor:
    """where(condition, body(*given), other), of which the body runs for ``rows`` alone, `rows_of` the condition.

    ``axes``: along which axis of each of ``given`` there are samples; None for what is the same for all.
    """
    if rows is False:
        return other
    per_token = condition.numel() != condition.size(0)
    if rows is True:
        y = body(*given)
        return torch.where(condition, y, other) if per_token else y
    y = body(*(x if axis is None else taken(x, axis, rows) for x, axis in zip(given, axes, strict=True)))
    if per_token:
        y = torch.where(taken(condition, 0, rows), y, taken(other, 0, rows))
    if isinstance(rows, slice):
        return other.slice_scatter(y, 0, rows.start, rows.stop)
    return other.index_copy(0, rows, y)


def taken(x: Tensor, axis: int, rows: slice | Tensor) -> Tensor:
    """Samples of a tensor; a view of those that follow one another."""
    if isinstance(rows, slice):
        return x.narrow(axis, rows.start, rows.stop - rows.start)
    return x.index_select(axis, rows)
