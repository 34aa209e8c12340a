"""Linear attention in all its forms: a feature map, a decay, a rule of writing, and what is done to the output."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention
from gatecc.ops.linear_attention.gates import log_decay
from gatecc.ops.state_space import StateSpace, linear
from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.decay import Decay, FromKeys, NoDecay
from gatecc.passes.mix.mixers.features import FeatureMap, Plain
from gatecc.passes.mix.mixers.packed import causal_convolution, forgetting, is_packed, kept


@dataclass(frozen=True)
class Linear(Mixer, tag="linear"):
    """o_t = scale S_t^T phi(q_t), S_t = diag(e^g_t) S_{t-1} + phi(k_t) v_t^T, and its relatives.

    ``feature`` is phi, ``decay`` g. ``rule="delta"`` writes beta (v - S^T k) with beta = sigmoid(W hidden), not v.
    ``rope`` keeps the rotary embedding of q and k. ``scale`` is Dk^-0.5 where it is 0. ``normalize`` divides by
    phi(q) · sum phi(k). ``norm="rms"`` normalises each head of the output, its weight starting at ``norm_weight``.
    ``conv`` taps of a causal depthwise convolution run over q, k and v first, the identity at init, then
    ``activation``. ``linear`` reads q and k as their projections yield them: norms of queries and keys are left out.

    Under a bidirectional mask both directions run and are averaged; each has a decay of its own (ViG). Without a decay
    every token reads one state of all.
    """

    packs: ClassVar[bool] = True

    feature: FeatureMap = Plain()
    decay: Decay = NoDecay()
    rule: Literal["linear", "delta"] = "linear"
    rope: bool = False
    scale: float = 0.0
    normalize: bool = False
    norm: Literal["none", "rms"] = "none"
    norm_weight: float = 1.0
    conv: int = 0
    activation: Literal["none", "silu"] = "none"
    linear: bool = False
    norm_eps: float = 1e-5

    def check(self) -> None:
        self.require(not (self.normalize and self.rule == "delta"), "normalize", "False with the delta rule")
        same = self.feature.width(1) == 1 or not isinstance(self.decay, FromKeys)
        self.require(same, "feature", "a map that keeps the width of keys, for decays are read from them")
        self.require(self.conv >= 0, "conv", "a number of taps, or 0")
        self.require(
            not (self.linear and self.rope), "linear", "False with rope, which reads q and k after their norms"
        )

    @property
    def operands(self) -> tuple[str, ...]:
        """The stages of q, k and v."""
        if self.linear:
            return "q_linear", "k_linear", "v"
        return ("q", "k", "v") if self.rope else ("q_raw", "k_raw", "v")

    @property
    def reads(self) -> tuple[str, ...]:
        more = (*self.decay.reads, *(("hidden",) if self.rule == "delta" else ()))
        return tuple(dict.fromkeys((*self.operands, *more)))

    def module(self, place: Place) -> MixerModule:
        return LinearMixer(self, place)


class LinearMixer(MixerModule):
    """The module of `Linear`."""

    tag = Linear.tag

    def __init__(self, spec: Linear, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        self.feature_q = spec.feature.module(place.heads, place.key)
        self.feature_k = spec.feature.module(place.kv_heads, place.key)
        directions = 1 if place.causal else 2
        features = replace(place, key=spec.feature.width(place.key))  # one decay a feature
        decays = [] if isinstance(spec.decay, NoDecay) else [spec.decay.module(features) for _ in range(directions)]
        self.decays = nn.ModuleList(decays)
        self.beta = nn.Linear(place.dim, place.heads, bias=False) if spec.rule == "delta" else None
        self.norm = nn.RMSNorm(place.value, eps=spec.norm_eps) if spec.norm == "rms" else None
        if self.norm is not None:
            nn.init.constant_(self.norm.weight, spec.norm_weight)
        widths = (place.heads * place.key, place.kv_heads * place.key, place.kv_heads * place.value)
        self.convs = nn.ModuleList([ShortConv(w, spec.conv) for w in widths] if spec.conv else [])
        if not place.causal and spec.conv:
            raise ArgumentError("a causal convolution before bidirectional attention", found=f"conv={spec.conv}")

    def forward(self, *values: Tensor) -> Tensor:
        """Stages in the order of ``reads``, and a padding mask if there is one -> heads (B, H, N, Dv)."""
        at, mask = self.spec.named(values)
        return self.finished(self._mixed(*self._operands(at, mask), at, mask).to(values[0].dtype))

    def state_space(self, *values: Tensor) -> StateSpace:
        """`gatecc.ops.state_space.linear` of what the operator reads."""
        if not self.place.causal:
            raise ArgumentError(
                "a state space does not look ahead", found="a bidirectional site", do="choose causal sites"
            )
        at, mask = self.spec.named(values)
        q, k, v = self._operands(at, mask)
        decay = None
        if self.decays:
            decay = log_decay(self._gates(0, at), self.spec.decay.gate_normalizer)
        decay = forgetting(decay, mask)
        scale = self.spec.scale or None
        return linear(q, k, v, decay, self._beta(at), scale=scale, normalize=self.spec.normalize, mask=kept(mask))

    def finished(self, y: Tensor) -> Tensor:
        """y: (B, H, N, Dv), each head normalised if the mixer does so."""
        return self.norm(y) if self.norm is not None else y

    def _operands(self, at: dict[str, Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as the operator reads them: convolved, their features taken."""
        q, k, v = (at[name] for name in self.spec.operands)
        keep = kept(mask)
        if keep is not None and self.convs:
            q, k, v = (x * keep[:, None, :, None] for x in (q, k, v))
        if self.convs:
            q, k, v = (conv(x, mask) for conv, x in zip(self.convs, (q, k, v), strict=True))
        if self.spec.activation == "silu":
            q, k, v = F.silu(q), F.silu(k), F.silu(v)
        q, k = self.feature_q(q), self.feature_k(k)
        v = v.to(q.dtype)
        return q, k.to(q.dtype), v

    def _mixed(self, q: Tensor, k: Tensor, v: Tensor, at: dict[str, Tensor], mask: Tensor | None) -> Tensor:
        scale = self.spec.scale or q.size(-1) ** -0.5
        beta = self._beta(at)
        options: dict[str, Any] = {"scale": scale, "normalize": self.spec.normalize, "mask": kept(mask)}
        if not self.place.causal and not self.decays and beta is None:
            return everything(q, k, v, scale, self.spec.normalize, mask)
        if self.decays:
            options["gate_normalizer"] = self.spec.decay.gate_normalizer
        runs = [self._gates(i, at) for i in range(len(self.decays))] or [None] * (1 if self.place.causal else 2)
        runs = [forgetting(g, mask, reverse=i > 0) for i, g in enumerate(runs)]
        outs = [linear_attention(q, k, v, g, beta, reverse=i > 0, **options)[0] for i, g in enumerate(runs)]
        return outs[0] if len(outs) == 1 else (outs[0] + outs[1]) * 0.5

    def _beta(self, at: dict[str, Tensor]) -> Tensor | None:
        return None if self.beta is None else torch.sigmoid(self.beta(at["hidden"]).float()).transpose(1, 2)

    def _gates(self, direction: int, at: dict[str, Tensor]) -> Tensor:
        """Log decays, or their logits."""
        return self.decays[direction](*(at[name] for name in self.spec.decay.reads))


class ShortConv(nn.Module):
    """A causal depthwise convolution over tokens, the identity at init."""

    def __init__(self, channels: int, taps: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels, 1, taps))
        with torch.no_grad():
            self.weight[..., -1] = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, H, N, D), zero at padding -> the same shape."""
        flat = x.transpose(1, 2).flatten(2).transpose(1, 2)  # (B, H*D, N)
        y = causal_convolution(flat, self.weight, mask=mask)
        return y.transpose(1, 2).unflatten(-1, (x.size(1), -1)).transpose(1, 2)


def everything(q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, mask: Tensor | None) -> Tensor:
    """Linear attention of every token to all tokens: (phi(q) (phi(k)^T v)) [/ phi(q) · sum phi(k)]."""
    if mask is not None and is_packed(mask):
        return _everything_packed(q, k, v, scale, normalize, mask)
    if mask is not None:
        k = k * mask[:, None, :, None]
    if k.size(1) != q.size(1):
        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, v))
    o = (q @ (k.mT @ v)) * scale
    if not normalize:
        return o
    total = (q * k.sum(2, keepdim=True)).sum(-1, keepdim=True) * scale
    return o / torch.where(total == 0, torch.ones_like(total), total)


def _everything_packed(q: Tensor, k: Tensor, v: Tensor, scale: float, normalize: bool, mask: Tensor) -> Tensor:
    """`everything` in each sequence of a row: what comes before a token, what comes after it, less itself twice."""
    held = torch.cat([v, torch.ones_like(v[..., :1])], -1) if normalize else v
    ways = [
        linear_attention(q, k, held, forgetting(None, mask, reverse=back), mask=kept(mask), scale=1.0, reverse=back)[0]
        for back in (False, True)
    ]
    if k.size(1) != q.size(1):
        k, held = (x.repeat_interleave(q.size(1) // x.size(1), 1) for x in (k, held))
    o = (ways[0] + ways[1] - (q * k).sum(-1, keepdim=True) * held * (mask > 0)[:, None, :, None]) * scale
    if not normalize:
        return o
    total = o[..., -1:]
    return o[..., :-1] / torch.where(total == 0, torch.ones_like(total), total)
