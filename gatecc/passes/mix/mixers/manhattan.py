"""Manhattan: attention inside image windows whose weights decay with the distance of two places, and a gate's due."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.passes.mix.mixers.base import Mixer, MixerModule, Place
from gatecc.passes.mix.mixers.hybrid import grouped


@dataclass(frozen=True)
class Manhattan(Mixer, tag="manhattan"):
    """Attention over the places (y, x) of a window, its weights decaying by gamma_h^(|y - y'| + |x - x'|).

    The decay of head h is gamma_h = 1 - 2^-(initial + spread h / H): constants (RMT, Fan et al. 2024). With ``split``
    attention runs along the rows, then along the columns, which costs h + w weights a place instead of h w.
    ``weights="softmax"``: softmax(q·k + distance log gamma), the retention of Gated-SwinRMT, plus a depthwise
    convolution of the values over the window of ``local`` x ``local`` places, zero at first (0: none).
    ``weights="sigmoid"``: sigmoid(q·k - slope_h distance) gamma_h^distance with the slopes of ALiBi,
    2^(-8 (h + 1) / H), its SWAT; it is not normalised and ``local`` must be 0.

    What the model's own mask hides, shifted windows say, stays hidden. A bias that the model learned for the scores has
    no place any more. (A reading of the abstract of Gated-SwinRMT.)
    """

    masks: ClassVar[tuple[str, ...]] = ("bidirectional",)
    windows: ClassVar[bool] = True

    weights: Literal["softmax", "sigmoid"] = "softmax"
    split: bool = True
    local: int = 5
    initial: float = 2.0
    spread: float = 4.0

    def check(self) -> None:
        self.require(self.weights in ("softmax", "sigmoid"), "weights", "softmax or sigmoid")
        self.require(self.local == 0 or self.local % 2 == 1, "local", "an odd number of places, or 0")
        self.require(not (self.local and self.weights == "sigmoid"), "local", "0 with sigmoid weights")
        self.require(self.initial > 0 and self.spread >= 0, "initial", "positive, and spread not negative")

    @property
    def regions(self) -> bool:
        return self.split

    def log_decay(self, heads: int, device: torch.device) -> Tensor:
        """log gamma: (H,)."""
        exponent = torch.arange(heads, device=device) * (self.spread / heads) + self.initial
        return torch.log1p(-torch.exp2(-exponent))

    def module(self, place: Place) -> MixerModule:
        return ManhattanMixer(self, place)


class ManhattanMixer(MixerModule):
    """The module of `Manhattan`."""

    tag = Manhattan.tag

    def __init__(self, spec: Manhattan, place: Place) -> None:
        super().__init__()
        self.spec, self.place = spec, place
        channels = place.heads * place.value
        self.local = nn.Parameter(torch.zeros(channels, 1, spec.local, spec.local)) if spec.local else None

    def forward(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None = None) -> Tensor:
        """q: (B, H, N, D), k and v: (B, Hk, N, D), seen: (B, 1 or H, N, N) -> heads (B, H, N, Dv)."""
        k, v = grouped(k, q.size(1)), grouped(v, q.size(1))
        if seen is not None:  # a padded query sees itself, so that its softmax has a key
            seen = seen | torch.eye(q.size(2), dtype=torch.bool, device=q.device)
        mixed = self._split(q, k, v, seen) if self.spec.split else self._whole(q, k, v, seen)
        return mixed if self.local is None else mixed + self._convolved(v, self.local)

    def _whole(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        height, width = self.place.grid
        y = torch.arange(height, device=q.device).repeat_interleave(width)
        x = torch.arange(width, device=q.device).repeat(height)
        distance = (y[:, None] - y).abs() + (x[:, None] - x).abs()
        return self._weights(q, k, distance, seen) @ v

    def _split(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
        """Along the rows, then along the columns: a place reads those of its column, and what they read in their rows.

        A mask is cut likewise; what is seen in two steps must be seen in one (`Mix` has proved that).
        """
        height, width = self.place.grid
        q, k, v = (t.unflatten(2, (height, width)) for t in (q, k, v))  # (B, H, y, x, D)
        rows = columns = None
        if seen is not None:
            full = seen.unflatten(3, (height, width)).unflatten(2, (height, width))  # (B, H, y, x, y', x')
            rows = full.diagonal(dim1=2, dim2=4).movedim(-1, 2)  # (B, H, y, x, x')
            columns = full.diagonal(dim1=3, dim2=5).movedim(-1, 2)  # (B, H, x, y, y')
        v = self._weights(q, k, _distance(width, q.device), rows) @ v
        q, k, v = (t.transpose(2, 3) for t in (q, k, v))
        v = self._weights(q, k, _distance(height, q.device), columns) @ v
        return v.transpose(2, 3).flatten(2, 3)

    def _weights(self, q: Tensor, k: Tensor, distance: Tensor, seen: Tensor | None) -> Tensor:
        """q, k: (B, H, ..., n, D), distance: (n, n), seen: (B, 1 or H, ..., n, n) -> (B, H, ..., n, n)."""
        heads = q.size(1)
        of_heads = (heads, *[1] * (q.dim() - 2))
        decay = (self.spec.log_decay(heads, q.device).view(of_heads) * distance).to(q.dtype)
        scores = (q @ k.mT) * self.place.scale
        if self.spec.weights == "softmax":
            scores = scores + decay
            return (scores if seen is None else scores.masked_fill(~seen, float("-inf"))).softmax(-1)
        slope = torch.exp2(-8.0 * (torch.arange(heads, device=q.device) + 1) / heads).view(of_heads)
        weights = torch.sigmoid(scores - (slope * distance).to(q.dtype)) * decay.exp()
        return weights if seen is None else weights.masked_fill(~seen, 0.0)

    def _convolved(self, v: Tensor, weight: Tensor) -> Tensor:
        """The depthwise convolution over the places of each window, zeros around it. v: (B, H, N, Dv) -> the same."""
        flat = v.transpose(2, 3).flatten(1, 2).unflatten(-1, self.place.grid)  # (B, H Dv, y, x)
        y = F.conv2d(flat, weight, padding=self.spec.local // 2, groups=weight.size(0))
        return y.flatten(2).unflatten(1, (v.size(1), -1)).transpose(2, 3)


def _distance(places: int, device: torch.device) -> Tensor:
    """(n, n)"""
    at = torch.arange(places, device=device)
    return (at[:, None] - at).abs()
