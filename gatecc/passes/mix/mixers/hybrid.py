"""Hybrids: softmax over a window of recent keys together with linear attention to what lies before it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.linear_attention.gates import log_decay
from gatecc.ops.state_space import StateSpace, linear, softmax
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.decay import Decay, FromKeys
from gatecc.passes.mix.mixers.features import FeatureMap, Hedgehog, SoftmaxMap
from gatecc.passes.mix.mixers.packed import delayed, forgetting, is_packed, kept, together


@dataclass(frozen=True)
class Liger(Mixer, tag="liger"):
    """(1 - share) linear attention + share sliding-window softmax, both from the pretrained weights (Lan et al. 2025).

    The linear part reads queries and keys before their rotary embedding through ``feature``, its decay comes from the
    keys: no new parameters. The softmax part sees the last ``window`` keys.
    """

    masks: ClassVar[tuple[str, ...]] = ("causal",)
    packs: ClassVar[bool] = True

    window: int = 64
    share: float = 0.5
    feature: FeatureMap = SoftmaxMap()
    decay: Decay = FromKeys()

    def check(self) -> None:
        self.require(self.window > 0, "window", "a positive number of keys")
        self.require(0.0 < self.share < 1.0, "share", "a number between 0 and 1")
        same = self.feature.width(1) == 1 or not isinstance(self.decay, FromKeys)
        self.require(same, "feature", "a map that keeps the width of keys, for decays are read from them")

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(("q", "k", "v", "q_raw", "k_raw", *self.decay.reads)))

    def module(self, place: Place) -> MixerModule:
        return LigerMixer(self, place)


class LigerMixer(MixerModule):
    """The module of `Liger`."""

    tag = Liger.tag

    def __init__(self, spec: Liger, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.feature_q = spec.feature.module(place.heads, place.key)
        self.feature_k = spec.feature.module(place.kv_heads, place.key)
        self.decay = spec.decay.module(replace(place, key=spec.feature.width(place.key)))

    def forward(self, *values: Tensor) -> Tensor:
        """Stages in the order of ``reads``, and a padding mask if there is one -> heads (B, H, N, Dv)."""
        at, mask = self.spec.named(values)
        q, k, v = at["q"], at["k"], at["v"]
        features, gates = self._far(at)
        options: dict[str, Any] = {"scale": 1.0, "mask": kept(mask), "gate_normalizer": self.spec.decay.gate_normalizer}
        far, _ = linear_attention(*features, v.to(features[0].dtype), forgetting(gates, mask), **options)
        near = window_attention(q, k, v, self._window(), self.place, mask)
        return torch.lerp(far.to(near.dtype), near, self.spec.share)

    def state_space(self, *values: Tensor) -> StateSpace:
        """The linear state and the cache of the window, side by side."""
        at, mask = self.spec.named(values)
        if mask is not None:
            raise ArgumentError(
                "the form of liger is known without padding",
                found="a padding mask",
                do="call the model without a padding mask",
            )
        features, gates = self._far(at)
        far = linear(*features, at["v"], log_decay(gates, self.spec.decay.gate_normalizer), scale=1.0)
        near = softmax(at["q"], at["k"], at["v"], scale=self.place.scale, window=self._window())
        return far.scaled(1 - self.spec.share) + near.scaled(self.spec.share)

    def _far(self, at: dict[str, Tensor]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Features of queries and keys; log decays, or their logits."""
        gates = self.decay(*(at[name] for name in self.spec.decay.reads))
        return (self.feature_q(at["q_raw"]), self.feature_k(at["k_raw"])), gates

    def _window(self) -> int:
        return min(self.spec.window, self.place.window or self.spec.window)


@dataclass(frozen=True)
class LoLCATs(Mixer, tag="lolcats"):
    """Softmax over the last ``window`` keys and linear attention to the older ones under one denominator.

    y = (w sum_near e^(q·k - m) v + sum_far phi(q)·phi(k) v) / (w sum_near e^(q·k - m) + sum_far phi(q)·phi(k)), with
    m the largest score of the window and w = sigmoid(a learned number per head), 0.1 at first (Zhang et al. 2024).
    """

    masks: ClassVar[tuple[str, ...]] = ("causal",)
    packs: ClassVar[bool] = True

    window: int = 64
    feature: FeatureMap = Hedgehog()

    def check(self) -> None:
        self.require(self.window > 0, "window", "a positive number of keys")

    def module(self, place: Place) -> MixerModule:
        return LoLCATsMixer(self, place)


class LoLCATsMixer(MixerModule):
    """The module of `LoLCATs`."""

    tag = LoLCATs.tag

    def __init__(self, spec: LoLCATs, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.feature_q = spec.feature.module(place.heads, place.key)
        self.feature_k = spec.feature.module(place.kv_heads, place.key)
        self.weight = nn.Parameter(torch.full((place.heads, 1, 1), -2.1972245))  # the logit of 0.1

    def forward(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D), mask: (B, N) -> heads (B, H, N, Dv)."""
        queries, keys = self.feature_q(q), self.feature_k(k)
        ones = torch.ones_like(v[..., :1])
        held = torch.cat([v, ones], -1).to(queries.dtype)
        keep = kept(mask)
        if keep is not None:
            held = held * keep[:, None, :, None]  # padding has neither value nor weight
        late = [0, 0, self.spec.window, 0]  # a key enters the state when it leaves the window
        entering = _cut(held, late)
        if mask is not None and is_packed(mask):  # not a key of the sequence before
            entering = entering * delayed(mask, self.spec.window)[:, None, :, None]
        far, _ = linear_attention(queries, _cut(keys, late), entering, forgetting(None, mask), scale=1.0)
        near = self._near(q, k, held, visible_keys(q.size(2), self.spec.window, q.device, mask))
        total = torch.sigmoid(self.weight.float()) * near + far
        weight = total[..., -1:]
        if keep is not None:
            weight = weight + ~keep[:, None, :, None]  # a padded query may see nothing
        return (total[..., :-1] / weight).to(v.dtype)

    def _near(self, q: Tensor, k: Tensor, held: Tensor, seen: Tensor) -> Tensor:
        """sum over the window of e^(score - largest) [v, 1]."""
        k, held = (grouped(x, q.size(1)) for x in (k, held))
        scores = (q @ k.mT).float() * self.place.scale
        scores = scores.masked_fill(~seen, float("-inf"))
        return (scores - scores.amax(-1, keepdim=True)).exp() @ held.float()


def _cut(x: Tensor, late: list[int]) -> Tensor:
    """The tensor moved to later tokens, zeros before it, of the same length."""
    return F.pad(x, late)[:, :, : x.size(2)]


def window_mask(tokens: int, window: int, device: torch.device) -> Tensor:
    """(N, N), True where a query sees a key: the last ``window`` ones, its own included."""
    at = torch.arange(tokens, device=device)
    distance = at[:, None] - at[None]
    return (distance >= 0) & (distance < window)


def visible_keys(tokens: int, window: int, device: torch.device, mask: Tensor | None = None) -> Tensor:
    """`window_mask` without padding and other sequences: (N, N), or (B, 1, N, N) for a mask (B, N)."""
    seen = window_mask(tokens, window, device)
    if mask is None:
        return seen
    own = torch.eye(tokens, dtype=torch.bool, device=device)  # a padded query sees itself, so that it has a key
    return (seen & together(mask)) | own


def window_attention(q: Tensor, k: Tensor, v: Tensor, window: int, place: Place, mask: Tensor | None = None) -> Tensor:
    """Softmax attention to the last ``window`` keys, padding left out: (B, H, N, Dv)."""
    seen = visible_keys(q.size(2), window, q.device, mask)
    k, v = (grouped(x, q.size(1)) for x in (k, v))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=place.scale)


def grouped(x: Tensor, heads: int) -> Tensor:
    """Keys or values repeated for each query head of their group."""
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)
