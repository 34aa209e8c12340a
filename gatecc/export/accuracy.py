"""Accuracy: what two runs of a model give for the same inputs, in the words that its users use.

Argmax agreement and bits per token are of outputs that are logits, ranks of similarities are of embeddings. An output
whose shape does not say which it is has an error alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.scope.family import difference

_ROWS = 3  # of embeddings, whose similarities can be ranked


@dataclass(frozen=True)
class Accuracy:
    """One output against that of the model as it was."""

    output: str
    error: float
    """The largest of |x - y| / max(1, max|x|)."""
    cosine: float
    """The least cosine of the whole output of one input, as it was and is."""
    agreement: float | None = None
    """The share of rows (last axis) whose largest entry is the same one."""
    bits_before: float | None = None
    """Bits per token of logits (B, N, V) for token ids (B, N), the next token being the label."""
    bits_after: float | None = None
    ranks: float | None = None
    """Spearman's correlation of the cosines of all pairs of embeddings (B, D)."""


@dataclass
class Gathered:
    """The numbers of one output, input by input."""

    output: str
    error: float = 0.0
    cosine: float = 1.0
    agreed: int = 0
    rows: int = 0
    bits: list[tuple[float, float, int]] = field(default_factory=list[tuple[float, float, int]])
    embeddings: list[tuple[Tensor, Tensor]] = field(default_factory=list[tuple[Tensor, Tensor]])

    def add(self, x: Tensor, y: Tensor, ids: Tensor | None, mask: Tensor | None) -> None:
        """Enter what the model gave before and gives now; ``ids``: (B, N) tokens, ``mask``: (B, N) 1 where they are
        some."""
        self.error = max(self.error, difference(x, y.to(x.dtype)))
        if not x.is_floating_point() or x.dim() < 2:
            return
        x, y = x.float(), y.float()
        flat = F.cosine_similarity(x.nan_to_num().flatten(), y.nan_to_num().flatten(), 0)
        self.cosine = min(self.cosine, flat.item() if bool(torch.isfinite(y).all() | ~torch.isfinite(x).all()) else 0.0)
        if x.dim() == 2:
            self.embeddings.append((x, y))
        if x.dim() < 2 or x.shape[-1] < 2:
            return
        self.agreed += int((x.argmax(-1) == y.argmax(-1)).sum())
        self.rows += x[..., 0].numel()
        if ids is not None and x.dim() == 3 and x.shape[:2] == ids.shape and int(ids.max()) < x.shape[-1]:
            self._tokens(x, y, ids, mask)

    def _tokens(self, x: Tensor, y: Tensor, ids: Tensor, mask: Tensor | None) -> None:
        kept = torch.ones_like(ids[:, 1:], dtype=torch.bool)
        if mask is not None and mask.shape == ids.shape:
            kept = (mask[:, 1:] != 0) & (mask[:, :-1] != 0)
        labels = ids[:, 1:][kept].long()
        if len(labels):
            before, after = (F.cross_entropy(z[:, :-1][kept], labels).item() / math.log(2) for z in (x, y))
            self.bits.append((before, after, len(labels)))

    def result(self) -> Accuracy:
        """The numbers over all inputs."""
        tokens = sum(n for *_, n in self.bits)
        return Accuracy(
            self.output,
            self.error,
            self.cosine,
            self.agreed / self.rows if self.rows else None,
            sum(b * n for b, _, n in self.bits) / tokens if tokens else None,
            sum(a * n for _, a, n in self.bits) / tokens if tokens else None,
            self._ranks(),
        )

    def _ranks(self) -> float | None:
        widths = {x.shape[1] for x, _ in self.embeddings}
        if len(widths) != 1 or sum(len(x) for x, _ in self.embeddings) < _ROWS:
            return None
        before, after = (torch.cat(list(z)) for z in zip(*self.embeddings, strict=True))
        return spearman(*(_pairs(z) for z in (before, after)))


def _pairs(x: Tensor) -> Tensor:
    """The cosines of all pairs of rows."""
    unit = F.normalize(x, dim=-1)
    first, second = torch.triu_indices(len(x), len(x), 1)
    return (unit @ unit.T)[first, second]


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of ranks."""
    a, b = (z.argsort().argsort().double() for z in (x, y))
    a, b = a - a.mean(), b - b.mean()
    return float((a @ b) / (a.norm() * b.norm()).clamp_min(1e-12))


def tokens_of(names: Sequence[str], leaves: Sequence[Tensor]) -> tuple[Tensor | None, Tensor | None]:
    """The token ids among some inputs, (B, N) integers, and the mask of their shape; None without."""
    held = {name: x for name, x in zip(names, leaves, strict=True) if x.dim() == 2 and not x.is_floating_point()}
    masks = [x for name, x in held.items() if "mask" in name]
    ids = [x for name, x in held.items() if "mask" not in name and x.dtype in (torch.int64, torch.int32)]
    return (ids[0] if ids else None), (masks[0] if masks else None)
