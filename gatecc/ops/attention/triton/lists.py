"""Which blocks of keys each block of queries reads, as lists that kernels go through.

Lists are found on the GPU and no value is read on the host, so a CUDA graph may hold it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.ops.attention.triton.tables import Rule


class Lists(NamedTuple):
    """One list for each block of each head: counts, how many blocks it names, indices, which, in their order, of
    ``width`` places each. ``batch`` and ``head``: how many lists lie between two of them, 0 if they share theirs."""

    counts: Tensor
    indices: Tensor
    batch: int
    head: int
    width: int


class BlockMap(NamedTuple):
    """A map of blocks, (B or 1, H or 1, rows, columns), True where queries of a row may read keys of a column; and how
    many queries and keys a block has."""

    at: Tensor
    queries: int
    keys: int

    @classmethod
    def of(cls, blocks: Tensor, sizes: tuple[int, int]) -> BlockMap:
        """The map of a call. A single row or column may as well be larger than it is: kernels ask for powers of two."""
        queries, keys = (
            1 << (max(size, 16) - 1).bit_length() if number == 1 else size
            for size, number in zip(sizes, blocks.shape[2:], strict=True)
        )
        return cls(blocks, queries, keys)

    @property
    def refusal(self) -> str | None:
        """Why kernels do not take it."""
        for what, size in (("queries", self.queries), ("keys", self.keys)):
            if size % 16:
                return f"blocks of {size} {what} have no kernel (a multiple of 16)"
        return None

    def lists(self, rule: Rule, *, of_keys: bool = False) -> Lists:
        """For each block of queries the blocks of keys that it reads, without those that nobody of it sees; or for each
        block of keys the blocks of queries that read it."""
        keep = self.at & self._visible(rule)
        keep = keep.mT if of_keys else keep
        batches, heads, rows, width = keep.shape
        indices = torch.argsort(keep.to(torch.uint8), dim=-1, descending=True, stable=True).to(torch.int32)
        batch, head = heads * rows if batches > 1 else 0, rows if heads > 1 else 0
        return Lists(keep.sum(-1, dtype=torch.int32).contiguous(), indices.contiguous(), batch, head, width)

    def _visible(self, rule: Rule) -> Tensor:
        """Where some query of a block sees some key of another: (rows, columns)."""
        rows, columns = (torch.arange(n, device=self.at.device) for n in self.at.shape[2:])
        first, last = rows * self.queries, ((rows + 1) * self.queries).clamp_max(rule.queries) - 1
        first_key, last_key = columns * self.keys, ((columns + 1) * self.keys).clamp_max(rule.keys) - 1
        seen = torch.ones(len(rows), len(columns), dtype=torch.bool, device=self.at.device)
        if rule.left is not None:
            seen &= last_key >= (first + rule.offset - rule.left)[:, None]
        if rule.right is not None:
            seen &= first_key <= (last + rule.offset + rule.right)[:, None]
        return seen
