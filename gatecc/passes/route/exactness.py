"""Exactness: whether a router's weights make fresh experts compute what the dense layer did, tried on logits.

Experts that are equal, or parts of one layer, add up to it if every token gives each part the same weight in all. Which
routers do that is not declared but tried: on zero logits if the router starts there, else on random ones. So it holds
for every choice, and what `Route` promises is what was seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._python_dispatch import _disable_current_modes

from gatecc.ir.gates.init import Zero
from gatecc.ir.router import RouterSpec

_TOKENS, _TOLERANCE = 64, 1e-5


@dataclass(frozen=True)
class Coverage:
    """``scale``: what makes the weights of each part sum to 1, None where no factor does; ``error``: how far the sums
    are from 1 then (without a factor: how far they differ, relative to their mean). ``zero``: tried on zero logits.
    """

    scale: float | None
    error: float
    zero: bool

    @property
    def exact(self) -> bool:
        """Whether a factor makes the layer what it was."""
        return self.scale is not None


@lru_cache(maxsize=256)
def coverage(router: RouterSpec, parts: tuple[int, ...], options: int) -> Coverage:
    """How much of each part of a dense layer a token gets at the start, in evaluation.

    ``parts``: the part of the layer that each expert computes; ``options``: the number of logits.
    """
    zero = isinstance(router.init, Zero) and router.scorer.trained
    with _disable_current_modes(), unset_fake_temporarily(), torch.random.fork_rng(devices=[]), torch.no_grad():
        sums = torch.cat([_sums(router, parts, logits) for logits in _logits(options, zero)])
        mean = float(sums.mean())
        error = float((sums / mean - 1).abs().max()) if mean > 0 else float("inf")
    if error > _TOLERANCE:
        return Coverage(None, error, zero)
    whole = round(1 / mean)
    return Coverage(float(whole) if abs(whole * mean - 1) < _TOLERANCE else 1 / mean, error, zero)


def _logits(options: int, zero: bool) -> list[Tensor]:
    if zero:
        return [torch.zeros(_TOKENS, options)]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(_TOKENS, options, generator=generator) * scale for scale in (0.1, 3.0)]


def _sums(router: RouterSpec, parts: tuple[int, ...], logits: Tensor) -> Tensor:
    """What each part of the layer weighs for each token: (T, parts)."""
    choice, options = router.choice, logits.size(1)
    if beyond := choice.scores(options) - options:  # of a noise, which there is none of in evaluation
        logits = torch.cat([logits, torch.zeros(logits.size(0), beyond)], 1)
    named = {**choice.parameters(options), **choice.buffers(options), **router.balance.buffers(options)}
    weights, indices = choice(logits, named, False)
    count = max(parts) + 1
    of = torch.tensor([*parts, count])  # an empty slot is of no part
    slots = of[indices.clamp(max=len(parts))]
    return torch.zeros(logits.size(0), count + 1).scatter_add_(1, slots, weights.float())[:, :count]
