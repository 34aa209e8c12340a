"""Attention as people write it: the same mathematics in many spellings."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spec import Spec
from tests.zoo.tower import HEADS, LONGEST, WIDTH, Attention, D, later, merge, packed_case, padded_case, split, tower


class ScaleBefore(Attention):
    """q is scaled; a boolean mask is filled with -inf."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q * WIDTH**-0.5) @ k.transpose(-2, -1)
        return scores.masked_fill(later(q.shape[2], k.shape[2]), float("-inf")).softmax(dim=-1) @ v


class ScaleBoth(Attention):
    """q and k each carry the root of the scale."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        root = WIDTH**-0.25
        return torch.matmul(torch.softmax(torch.matmul(q * root, (k * root).mT), 3), v)


class Additive(Attention):
    """Scores are divided, then an additive mask; key columns made by permute."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        bias = torch.full((q.shape[2], k.shape[2]), float("-inf")).triu(1)
        return F.softmax(torch.matmul(q, k.permute(0, 1, 3, 2)) / math.sqrt(WIDTH) + bias, dim=-1) @ v


class MaskThenScale(Attention):
    """The mask is added first and scaled too."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = (q @ k.mT - 1e9 * later(q.shape[2], k.shape[2]).float()) * WIDTH**-0.5
        return torch.softmax(scores, dim=-1) @ v


class Where(Attention):
    """torch.where against finfo.min, softmax in float32, cast back."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT / math.sqrt(WIDTH)
        scores = torch.where(later(*scores.shape[-2:]), torch.finfo(scores.dtype).min, scores)
        return F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype) @ v


class Tril(Attention):
    """minGPT: a causal buffer, sliced, compared with zero; dropout on the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.bias: Tensor
        self.register_buffer("bias", torch.tril(torch.ones(LONGEST, LONGEST))[None, None])
        self.drop = nn.Dropout(0.1)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        scores = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(WIDTH))
        scores = scores.masked_fill(self.bias[:, :, :n, :n] == 0, float("-inf"))
        return self.drop(F.softmax(scores, dim=-1)) @ v


class InPlace(Attention):
    """Scores are scaled, masked and exponentiated in place where that is allowed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.matmul(q, k.mT)
        scores /= math.sqrt(WIDTH)
        scores.masked_fill_(later(*scores.shape[-2:]), -1e30)
        return F.dropout(scores.softmax(-1), 0.1, self.training) @ v


class Multiplied(Attention):
    """The first GPT: scores * allowed - 1e4 * (1 - allowed)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        allowed = torch.tril(torch.ones(q.shape[2], k.shape[2]))
        scores = (q @ k.mT) / math.sqrt(WIDTH)
        return torch.softmax(scores * allowed - 1e4 * (1 - allowed), dim=-1) @ v


class Einsum(Attention):
    """Heads stay behind the tokens: no transpose anywhere."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (HEADS, WIDTH)) for p in (self.q, self.k, self.v))
        weights = torch.einsum("bnhe,bmhe->bhnm", q, k).div(math.sqrt(WIDTH)).softmax(dim=-1)
        return self.out(torch.einsum("bhnm,bmhe->bnhe", weights, v).flatten(2))


class Bmm(Attention):
    """Batch and heads are one axis; torch.baddbmm adds the mask and scales."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, n, _ = q.shape
        q, k, v = (t.reshape(batch * heads, n, WIDTH) for t in (q, k, v))
        bias = torch.zeros(n, n).masked_fill(later(n, n), float("-inf")).expand(batch * heads, n, n)
        weights = F.softmax(torch.baddbmm(bias, q, k.transpose(1, 2), alpha=WIDTH**-0.5), dim=-1)
        return torch.bmm(weights, v).view(batch, heads, n, WIDTH)


class SwappedValues(Attention):
    """(v^T w^T)^T: the values stand on the left."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.mT * WIDTH**-0.5).softmax(-1)
        return (v.mT @ weights.mT).mT


class SwappedScores(Attention):
    """k q^T, normalised over its first axis."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = torch.softmax(k @ q.mT * WIDTH**-0.5, dim=-2)
        return weights.mT @ v


class GroupedExpand(Attention):
    """Llama's repeat_kv: expand and reshape."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (t[:, :, None].expand(-1, -1, HEADS // 2, -1, -1).flatten(1, 2) for t in (k, v))
        scores = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(later(q.shape[2], k.shape[2]), float("-inf"))
        return scores.softmax(-1) @ v


class GroupedRepeat(Attention):
    """repeat_interleave over the heads."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        k, v = (t.repeat_interleave(HEADS // 2, dim=1) for t in (k, v))
        scores = (q @ k.mT / math.sqrt(WIDTH)).masked_fill(later(q.shape[2], k.shape[2]), float("-inf"))
        return scores.softmax(-1) @ v


class GroupedEinsum(Attention):
    """The groups are an axis of their own: nothing is repeated."""

    kv_heads = 2

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        q = q.unflatten(1, (2, -1))
        weights = torch.softmax(torch.einsum("bgrne,bgme->bgrnm", q, k) / math.sqrt(WIDTH), -1)
        return torch.einsum("bgrnm,bgme->bgrne", weights, v).flatten(1, 2)


class MultiQuery(Attention):
    """One key-value head, by broadcasting."""

    kv_heads = 1

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return (q @ k.mT / math.sqrt(WIDTH)).softmax(-1) @ v


class SingleHead(Attention):
    """No head axis at all."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(F.softmax(self.q(x) @ self.k(x).mT / math.sqrt(D), dim=-1) @ self.v(x))


class ManualSoftmax(Attention):
    """exp and a division, shifted by the largest score."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT / math.sqrt(WIDTH)
        scores = scores.masked_fill(later(*scores.shape[-2:]), float("-inf"))
        powers = torch.exp(scores - scores.amax(dim=-1, keepdim=True))
        return powers / powers.sum(dim=-1, keepdim=True) @ v


class ManualReciprocal(Attention):
    """exp, and a product with the reciprocal of the sum."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = torch.einsum("bhne,bhme->bhnm", q, k) * WIDTH**-0.5
        powers = (scores - scores.max(-1, keepdim=True).values).exp()
        return (powers * powers.sum(-1, keepdim=True).reciprocal()) @ v


class LogSoftmax(Attention):
    """exp of the scores less their logsumexp."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT * WIDTH**-0.5
        return torch.exp(scores - scores.logsumexp(-1, keepdim=True)) @ v


class Alibi(Attention):
    """A bias that falls with the distance, one slope per head."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = k.shape[2]
        slopes = 2.0 ** -torch.arange(1, HEADS + 1)
        bias = slopes[:, None, None] * (torch.arange(n) - torch.arange(n)[:, None])
        scores = q @ k.mT * WIDTH**-0.5 + bias
        return scores.masked_fill(later(n, n), float("-inf")).softmax(-1) @ v


class RelativeBias(Attention):
    """T5: a learned bias by clipped distance; the scores are not scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Embedding(17, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(q.shape[2])
        distance = (place - place[:, None]).clamp(-8, 8) + 8
        return F.softmax(q @ k.mT + self.bias(distance).permute(2, 0, 1)[None], dim=-1) @ v


class RelativeKeys(Attention):
    """Shaw et al. 2018: the query meets a learned vector for the distance, too."""

    def __init__(self) -> None:
        super().__init__()
        self.distance = nn.Embedding(17, WIDTH)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        place = torch.arange(q.shape[2])
        relative = self.distance((place - place[:, None]).clamp(-8, 8) + 8)
        scores = q @ k.mT + torch.einsum("bhne,nme->bhnm", q, relative)
        return (scores * WIDTH**-0.5).softmax(-1) @ v


class Rope(Attention):
    """Rotary positions, turned half by half."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        rates = 100.0 ** -torch.arange(0, 1, 2 / WIDTH)
        angle = (torch.arange(q.shape[2])[:, None] * rates).repeat(1, 2)

        def turn(x: Tensor) -> Tensor:
            one, two = x.chunk(2, -1)
            return x * angle.cos() + torch.cat([-two, one], -1) * angle.sin()

        scores = turn(q) @ turn(k).mT * WIDTH**-0.5
        return scores.masked_fill(later(*scores.shape[-2:]), float("-inf")).softmax(-1) @ v


class SoftCap(Attention):
    """Gemma 2: the scores pass a tanh. q and k are normalised."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = F.rms_norm(q, (WIDTH,)) @ F.normalize(k, dim=-1).mT
        scores = (torch.tanh(scores / 5.0) * 5.0).masked_fill(later(*scores.shape[-2:]), float("-inf"))
        return scores.softmax(-1) @ v


class Sink(Attention):
    """A learned logit per head takes part in the softmax and is dropped after it."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = nn.Parameter(torch.zeros(HEADS))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT * WIDTH**-0.5
        sink = self.sink[None, :, None, None].expand(*scores.shape[:3], 1)
        return torch.cat([scores, sink], dim=-1).softmax(-1)[..., :-1] @ v


class Sliding(Attention):
    """Causal, eight keys at most."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        row, column = torch.arange(q.shape[2])[:, None], torch.arange(k.shape[2])
        seen = (column <= row) & (row - column < 8)
        return (q @ k.mT * WIDTH**-0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Padded(Attention):
    """A padding mask, which may be None."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        scores = q @ k.mT * WIDTH**-0.5
        if mask is not None:
            scores = scores + (1.0 - mask[:, None, None].float()) * -10000.0
        return scores.softmax(-1) @ v


class PaddedCausal(Attention):
    """Causal and padding masks in one boolean."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        seen = ~later(q.shape[2], k.shape[2])[None, None]
        if mask is not None:
            seen = seen & mask[:, None, None].bool()
        scores = (q @ k.mT * WIDTH**-0.5).masked_fill(seen.logical_not(), torch.finfo(q.dtype).min)
        return scores.softmax(-1) @ v


class Packed(Attention):
    """Several texts in one row: `mask` holds the text's number, and a text sees itself only."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        assert mask is not None
        same = mask[:, None, :, None] == mask[:, None, None, :]
        seen = same & ~later(q.shape[2], k.shape[2])
        return (q @ k.mT * WIDTH**-0.5).masked_fill(~seen, float("-inf")).softmax(-1) @ v


class Fused(Attention):
    """One projection for q, k and v; subclasses cut it in different ways."""

    def __init__(self) -> None:
        super().__init__()
        del self.q, self.k, self.v
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.cut(self.qkv(x))
        weights = (q @ k.mT * WIDTH**-0.5).softmax(-1)
        return self.out(merge(weights @ v))

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return tuple(split(part) for part in qkv.split(D, dim=2))


class FusedChunk(Fused):
    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return split(qkv).chunk(3, dim=1)


class FusedUnbind(Fused):
    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        return qkv.unflatten(-1, (3, HEADS, WIDTH)).permute(2, 0, 3, 1, 4).unbind(0)


class FusedIndex(Fused):
    """GPT-NeoX's order: heads first, then q, k, v."""

    def cut(self, qkv: Tensor) -> tuple[Tensor, ...]:
        heads = qkv.unflatten(-1, (HEADS, 3, WIDTH)).transpose(1, 2)
        return heads[..., 0, :], heads[..., 1, :], heads[..., 2, :]


def specs() -> list[Spec]:
    return [
        tower("scale_before", ScaleBefore, "causal"),
        tower("scale_both", ScaleBoth),
        tower("additive", Additive, "causal"),
        tower("mask_then_scale", MaskThenScale, "causal"),
        tower("where", Where, "causal"),
        tower("tril", Tril, "causal"),
        tower("in_place", InPlace, "causal"),
        tower("multiplied", Multiplied, "causal"),
        tower("einsum", Einsum),
        tower("bmm", Bmm, "causal"),
        tower("swapped_values", SwappedValues),
        tower("swapped_scores", SwappedScores),
        tower("gqa_expand", GroupedExpand, "causal"),
        tower("gqa_repeat", GroupedRepeat, "causal"),
        tower("gqa_einsum", GroupedEinsum),
        tower("mqa", MultiQuery),
        tower("single_head", SingleHead),
        tower("manual_softmax", ManualSoftmax, "causal"),
        tower("manual_reciprocal", ManualReciprocal),
        tower("log_softmax", LogSoftmax),
        tower("alibi", Alibi, "causal"),
        tower("relative_bias", RelativeBias),
        tower("relative_keys", RelativeKeys),
        tower("rope", Rope, "causal"),
        tower("soft_cap", SoftCap, "causal"),
        tower("sink", Sink),
        tower("sliding", Sliding, "sliding:8"),
        tower("padded", Padded, "varied", case=padded_case),
        tower("padded_none", Padded),
        tower("padded_causal", PaddedCausal, "varied", causal=True, case=padded_case),
        tower("packed", Packed, "varied", causal=True, case=packed_case),
        tower("qkv_split", Fused),
        tower("qkv_chunk", FusedChunk),
        tower("qkv_unbind", FusedUnbind),
        tower("qkv_index", FusedIndex),
    ]
