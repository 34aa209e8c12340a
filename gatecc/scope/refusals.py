"""Refusals: calls that could not be captured, so that each is not tried again and again; but the reason may go."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from gatecc.capture.reads import Read, same_reads
from gatecc.capture.signature import Key

LIMIT = 64  # kinds of call that are remembered; the oldest goes first
SIZES = 3  # sizes that were tried of one kind: then other sizes are taken to fail as well


class Refused(NamedTuple):
    """One failed capture: the sizes of the call, the attributes that it read until it failed, and why it did."""

    sizes: tuple[torch.Size, ...]
    reads: tuple[Read, ...]
    reason: str


class Refusals:
    """The failed captures of a scope, by kind of call. They are tried again where an attribute that was read changed,
    and for other sizes a few times. Copies start anew."""

    def __init__(self) -> None:
        self._of_kind: OrderedDict[Key, list[Refused]] = OrderedDict()

    def find(self, key: Key, leaves: Sequence[torch.Tensor], module: nn.Module) -> str | None:
        """Why a call cannot be captured; None if it may be tried."""
        known = [r for r in self._of_kind.get(key, ()) if same_reads(r.reads, module)]
        sizes = _sizes(leaves)
        for refused in known:
            if refused.sizes == sizes or len(known) >= SIZES:
                return refused.reason
        return None

    def add(self, key: Key, leaves: Sequence[torch.Tensor], reads: tuple[Read, ...], reason: str) -> None:
        """Remember a failed capture."""
        of_kind = self._of_kind.setdefault(key, [])
        of_kind.append(Refused(_sizes(leaves), reads, reason))
        del of_kind[:-SIZES]
        if len(self._of_kind) > LIMIT:
            self._of_kind.popitem(last=False)

    def __len__(self) -> int:
        return sum(map(len, self._of_kind.values()))


def _sizes(leaves: Sequence[torch.Tensor]) -> tuple[torch.Size, ...]:
    return tuple(x.shape for x in leaves)
