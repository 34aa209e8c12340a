"""The table of kernels of ``gatecc::evicted_attention`` for one new token, and what runs where there is none."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from gatecc.ops.evicted_attention import cache
from gatecc.ops.evicted_attention.presence import Rule

State = tuple[Tensor, Tensor, Tensor]


class Kernels(Protocol):
    """What a device does itself: one token, whose key and value are written behind those that are held."""

    def fits(self, q: Tensor, v: Tensor, keys: Tensor) -> bool:
        """Whether it computes such a call."""
        ...

    def step(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        keep: Tensor,
        valid: Tensor | None,
        state: State,
        scale: float,
        rule: Rule,
        softcap: float,
    ) -> tuple[Tensor, Tensor] | None:
        """The result and the next places; None, and nothing is written, where a head has no room left."""
        ...


KERNELS: dict[str, Kernels] = {}


def register(device: str, kernels: Kernels) -> None:
    """Let ``kernels`` serve a device type, "cpu" or "cuda"."""
    KERNELS[device] = kernels


def one_token(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None,
    keys: Tensor,
    values: Tensor,
    places: Tensor,
    *,
    scale: float,
    budget: int = 0,
    softcap: float = 0.0,
    recent: int = 0,
    **_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The operator for one token in a decoder, which sees to it that nobody else holds the memory behind the tokens
    that a cache holds; what padding gets is of no use there. q: (B, H, 1, D)"""
    rule = Rule(budget, recent)
    kernels = KERNELS.get(q.device.type)
    if kernels is None or not kernels.fits(q, v, keys):
        return cache.advance(q, k, v, keep, valid, keys, values, places, scale=scale, rule=rule, softcap=softcap)
    found = kernels.step(q, k, v, keep, valid, (keys, values, places), scale, rule, softcap)
    if found is None:
        keys, values, places = cache.enlarged(keys, values, places, rule)
        found = kernels.step(q, k, v, keep, valid, (keys, values, places), scale, rule, softcap)
        assert found is not None
    return found[0], keys, values, found[1]
