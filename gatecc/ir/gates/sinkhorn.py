"""Sinkhorn's iteration: from scores of rows and columns to a transport plan between them."""

from __future__ import annotations

import torch
from torch import Tensor


def transport_plan(log: Tensor, iters: int) -> Tensor:
    """log: (T, E), logarithms of positive numbers -> (T, E): rows sum to 1, columns to T / E once it has converged."""
    rows, columns = log.size(0), log.size(1)
    share = torch.log(torch.ones((), dtype=log.dtype, device=log.device) * rows / columns)
    for _ in range(iters):
        log = log - torch.logsumexp(log, 0, keepdim=True) + share
        log = log - torch.logsumexp(log, 1, keepdim=True)
    return log.exp()
