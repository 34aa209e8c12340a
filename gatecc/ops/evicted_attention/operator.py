"""``gatecc::evicted_attention``: schema, fake kernel, autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.evicted_attention.cache import advance
from gatecc.ops.evicted_attention.masked import at_padding, masked, no_cache
from gatecc.ops.evicted_attention.presence import Presence, Rule
from gatecc.ops.evicted_attention.skipping import attend
from gatecc.ops.transforms import LIBRARY, autocast, below_autograd, has_tangents

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor keep, Tensor? valid=None, Tensor? keys=None, Tensor? values=None, "
    "Tensor? places=None"
)
_OPTIONS = (
    "float scale, bool causal=True, int window=0, int budget=0, float softcap=0.0, bool spread=False, int recent=0"
)
LIBRARY.define(
    f"evicted_attention({_TENSORS}, *, {_OPTIONS}) -> (Tensor out, Tensor keys, Tensor values, Tensor places)"
)
Result = tuple[Tensor, Tensor, Tensor, Tensor]


def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    places: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    budget: int = 0,
    softcap: float = 0.0,
    spread: bool = False,
    recent: int = 0,
) -> Result:
    rule = Rule(budget, recent)
    _check(q, k, v, keep, causal, window, rule)
    if keys is None or values is None or places is None:
        options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "rule": rule}
        out = attend(q, k, v, Presence.of(keep, valid, rule), **options, softcap=softcap)
        return at_padding(out, v, valid, spread).contiguous(), *no_cache(q, k, v, recent)
    if window or not causal:
        raise ArgumentError(
            "a cache is of causal attention without a window",
            found=f"causal {causal}, window {window}",
            expected="causal=True and window=0, or no keys, values and places",
            do="call it without a cache, on all tokens at once",
        )
    out, *cache = advance(q, k, v, keep, valid, keys, values, places, scale=scale, rule=rule, softcap=softcap)
    return at_padding(out, v, valid, spread), cache[0], cache[1], cache[2]


def _check(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, causal: bool, window: int, rule: Rule) -> None:
    B, H, N, D = q.shape
    K = k.size(1)
    fits = k.shape == (B, K, N, D) and v.shape[:3] == (B, K, N) and keep.shape == (B, K, N) and H % K == 0
    if not fits:
        raise ArgumentError(
            "operands of evicted attention do not fit",
            found=", ".join(f"{n} {tuple(x.shape)}" for n, x in (("q", q), ("k", k), ("v", v), ("keep", keep))),
            expected="q (B, H, N, D), k (B, K, N, D), v (B, K, N, E), keep (B, K, N), K dividing H",
        )
    budget, recent = rule
    if min(rule) < 0 or (budget and window) or (any(rule) and not causal):
        raise ArgumentError(
            "a budget, and what stays for being recent, count the tokens before a query",
            found=f"budget {budget}, recent {recent}, causal {causal}, window {window}",
            expected="causal attention, without a window where there is a budget, and numbers of 0 or more",
        )
    if budget and recent > budget:
        raise ArgumentError(
            "the newest tokens alone are more than the budget",
            found=f"recent {recent}, budget {budget}",
            expected="recent of the budget at most",
        )


def _fake(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, *rest: Tensor | None, recent: int = 0, **options: Any
) -> Result:
    return q.new_empty((*q.shape[:3], v.size(3))), *no_cache(q, k, v, recent)


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Any:
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)
    if learns or has_tangents(tensors):
        return masked(*tensors, **options)
    return below_autograd(_OPERATOR, keys, options, *tensors)


def _of_one_dtype(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under autocast q, k and v meet in the widest of their dtypes; flags stay as they are."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors[:3] if x is not None))
    return (*(None if x is None else x.to(widest) for x in tensors[:3]), *tensors[3:])


LIBRARY.impl("evicted_attention", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::evicted_attention", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.evicted_attention.default
LIBRARY.impl("evicted_attention", _autograd, "Autograd", with_keyset=True)
autocast(_OPERATOR, _of_one_dtype, masked)


def evicted_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keep: Tensor,
    valid: Tensor | None = None,
    keys: Tensor | None = None,
    values: Tensor | None = None,
    places: Tensor | None = None,
    *,
    scale: float,
    causal: bool = True,
    window: int = 0,
    budget: int = 0,
    softcap: float = 0.0,
    spread: bool = False,
    recent: int = 0,
) -> Result:
    """softmax(scale q k^T) v of which later queries see the kept keys alone, (B, H, N, E), and the next cache.

    Args:
        q: (B, H, N, D).
        k, v: (B, K, N, D) and (B, K, N, E); H / K heads share one.
        keep: (B, K, N), above a half where the token stays for later queries. A query always sees its own token.
        valid: (B, N), False at padding, which nobody else sees.
        keys, values, places: the cache of the tokens before, as the call before returned it: its layout is in
            `gatecc.ops.evicted_attention.cache`. It is not changed. Without one there are no tokens before, and none
            is returned.
        causal: whether a query sees earlier tokens alone.
        window: how many tokens back a query sees, itself among them; 0 for all.
        budget: how many tokens a head may hold; 0 for any number. Flagged tokens then stay while there is room. Once
            there is none the oldest flagged ones go first, and where no flagged one is left, the oldest of all
            (Paging with succinct predictions, 2022).
        recent: how many tokens before a query's own it sees whatever their flags say: the newest are always held, and
            count in the budget. What is older comes under flags and budget.
        softcap: scores s become softcap tanh(s / softcap); 0 for none.
        spread: padding, which sees nothing, gets the mean of all values and not 0: what a softmax makes of scores that
            are all the least number there is.

    Where a gradient is wanted it is the formula with a mask, with a straight-through gradient for ``keep``; without one
    keys that have left are not read. Raises ArgumentError for operands that do not fit.

    Attention-Gate (In-context KV-cache eviction for LLMs via attention-gate, 2024).
    """
    options: dict[str, Any] = {"scale": scale, "causal": causal, "window": window, "budget": budget}
    options |= {"softcap": softcap, "spread": spread, "recent": recent}
    return torch.ops.gatecc.evicted_attention(q, k, v, keep, valid, keys, values, places, **options)
