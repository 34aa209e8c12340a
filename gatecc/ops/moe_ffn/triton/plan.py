"""Which slots each block of rows serves, found on the GPU: no size is read on the host, so a CUDA graph may hold it."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Plan(NamedTuple):
    """The slots by expert, then as they came, empty ones (expert E) last; S = T k of them.

    order: (S,), the slot (token * k + place) at each place; experts: (S,), its expert. edges: (E + 2,), where each
    expert begins. table: (number, 3), for each block of up to ``rows`` places of one expert: the expert, the first
    place, how many places. There are as many blocks as the worst case needs; those that are left over have none.
    """

    order: Tensor
    experts: Tensor
    edges: Tensor
    table: Tensor
    number: int


def plan(indices: Tensor, experts: int, rows: int) -> Plan:
    """The plan of indices (T, k). An index that is no expert counts as E."""
    flat = indices.reshape(-1)
    flat = torch.where((flat >= 0) & (flat <= experts), flat, experts).to(torch.int32)  # radix sorts take half the time
    found, order = torch.sort(flat, stable=True)
    edges = torch.searchsorted(found, torch.arange(experts + 2, device=flat.device, dtype=torch.int32))
    counts = edges[1:] - edges[:-1]
    blocks = (counts + (rows - 1)) // rows
    ends = blocks.cumsum(0)
    S, groups = flat.numel(), experts + 1
    number = min(S, (S + groups * (rows - 1)) // rows)
    at = torch.arange(number, device=flat.device)
    expert = torch.searchsorted(ends, at, right=True)
    known = expert.clamp_max(experts)
    first = edges[known] + (at - (ends - blocks)[known]) * rows
    count = torch.where(expert < groups, (edges[known + 1] - first).clamp_max(rows), 0)
    return Plan(order, found.long(), edges, torch.stack([expert, first, count], 1), number)
