"""``gatecc::in_segments``: keys and values of attention in which tokens of a condition see their own condition only.

In an ordinary call it says which keys a query sees, and hands keys and values on. What the tokens of a condition
compute does not depend on the others, so a `Kept` holds their keys and values, and later calls leave these tokens out.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import local

import torch
from torch import Tensor

from gatecc.errors import ArgumentError

_LIBRARY = torch.library.Library("gatecc", "FRAGMENT")
_LIBRARY.define(
    "in_segments(Tensor k, Tensor v, Tensor segment, bool plain, str tokens, str others) -> (Tensor, Tensor, Tensor)"
)


def in_segments(
    k: Tensor, v: Tensor, segment: Tensor, plain: bool, tokens: str, others: str
) -> tuple[Tensor, Tensor, Tensor]:
    """k, v: (B, H, M, D), segment: (B, N) -> k, v and (B, 1, N, M), True where a query sees a key.

    ``plain``: nothing else hides keys. ``tokens`` and ``others`` name the inputs of the model that reach k and v, those
    with a row for each token and the rest.
    """
    return torch.ops.gatecc.in_segments(k, v, segment, plain, tokens, others)


def seen_in(segment: Tensor) -> Tensor:
    """segment: (B, N) -> (B, 1, N, N), True where a query (the third axis) sees a key."""
    query, key = segment.unsqueeze(-1), segment.unsqueeze(-2)
    return ((query == 0) | (query == key)).unsqueeze(1)


@dataclass(eq=False)
class Kept:
    """Keys and values of the conditions of one call, layer by layer, and how often they were computed and read."""

    computed: int = 0
    reused: int = 0
    layers: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])
    tokens: set[str] = field(default_factory=set[str])
    others: set[str] = field(default_factory=set[str])
    at: int = 0
    reads: bool | None = None

    def start(self) -> None:
        """A call of the model begins."""
        self.at, self.reads = 0, None

    def layer(
        self, k: Tensor, v: Tensor, segment: Tensor, plain: bool, tokens: str, others: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One attention of the call."""
        if not plain:
            raise _lacking("keys that the model hides by a mask of its own, or attention that is spelled out")
        if self.reads is None:
            self.reads = bool(self.layers) and not bool(segment.any())
            self.layers = self.layers if self.reads else []
        self.tokens |= set(filter(None, tokens.split(",")))
        self.others |= set(filter(None, others.split(",")))
        self.at += 1
        if self.reads:
            return self._more(k, v, segment)
        there = segment != 0
        if not bool((there.sum(1) == there[0].sum()).all()):
            raise _lacking("samples with different numbers of tokens of conditions")
        rows = there.nonzero()[:, 1].view(segment.size(0), 1, -1, 1)
        held_k, held_v = (x.gather(2, rows.expand(-1, x.size(1), -1, x.size(3))) for x in (k, v))
        self.layers.append((held_k, held_v))
        return k, v, seen_in(segment)

    def _more(self, k: Tensor, v: Tensor, segment: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.at > len(self.layers) or self.layers[self.at - 1][0].size(0) != k.size(0):
            raise _lacking("another number of samples or layers than the call that computed the conditions")
        old_k, old_v = self.layers[self.at - 1]
        more = torch.cat([k, old_k], 2)
        seen = torch.ones(k.size(0), 1, segment.size(1), more.size(2), dtype=torch.bool, device=k.device)
        return more, torch.cat([v, old_v], 2), seen


_ACTIVE = local()


@contextmanager
def keeping(kept: Kept | None) -> Generator[None]:
    """Calls in this thread keep conditions, or read those that are kept."""
    before, _ACTIVE.kept = getattr(_ACTIVE, "kept", None), kept
    try:
        yield
    finally:
        _ACTIVE.kept = before


def _kernel(
    k: Tensor, v: Tensor, segment: Tensor, plain: bool, tokens: str, others: str
) -> tuple[Tensor, Tensor, Tensor]:
    kept: Kept | None = getattr(_ACTIVE, "kept", None)
    if kept is not None and type(k) is Tensor and not torch.compiler.is_compiling():
        return kept.layer(k, v, segment, plain, tokens, others)
    return k.view_as(k), v.view_as(v), seen_in(segment)


def _lacking(found: str) -> ArgumentError:
    return ArgumentError(
        "the keys and values of conditions cannot be kept for these calls",
        found=found,
        expected="fused attention over one sequence, and conditions of one length in every sample",
        do="call the model without gatecc.condition_cache, with all tokens",
    )


_LIBRARY.impl("in_segments", _kernel, "CompositeImplicitAutograd")
