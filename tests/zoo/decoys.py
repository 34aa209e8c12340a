"""What looks like attention and is none, or is none that a plain rewrite may touch. A matcher finds zero cores here."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.zoo.spec import Spec
from tests.zoo.tower import HEADS, WIDTH, Attention, D, later, merge, split, tower

EXPERTS = 4


class TalkingHeads(Attention):
    """A Linear mixes the heads' weights between the softmax and the values."""

    def __init__(self) -> None:
        super().__init__()
        self.talk = nn.Linear(HEADS, HEADS)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.mT * WIDTH**-0.5).softmax(-1)
        return self.talk(weights.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) @ v


class ScaledWeights(Attention):
    """Affine-scaled attention: a learned factor and offset after the softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = nn.Parameter(torch.ones(HEADS, 1, 1))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.mT * WIDTH**-0.5).softmax(-1)
        return (weights * self.factor.sigmoid() + 0.1 / k.shape[2]) @ v


class Differential(Attention):
    """Differential transformer: the weights are the difference of two softmaxes."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        (q1, q2), (k1, k2) = q.chunk(2, -1), k.chunk(2, -1)
        return ((q1 @ k1.mT).softmax(-1) - 0.5 * (q2 @ k2.mT).softmax(-1)) @ v


class Bahdanau(Attention):
    """Additive scores: a learned vector times tanh(q + k)."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(WIDTH, 1, bias=False)

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return self.score(torch.tanh(q[:, :, :, None] + k[:, :, None])).squeeze(-1).softmax(-1) @ v


class Synthesizer(Attention):
    """Random Synthesizer: the scores are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.zeros(HEADS, 64, 64))

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        return self.scores[:, :n, :n].softmax(-1) @ v


class SigmoidAttention(Attention):
    """No softmax: every weight is a sigmoid."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return torch.sigmoid(q @ k.mT * WIDTH**-0.5 - 3.0) @ v


class LinearAttention(Attention):
    """Softmaxes of q and of k, and no N by N matrix (Efficient Attention)."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        return q.softmax(-1) @ (k.softmax(-2).mT @ v)


class Retention(Attention):
    """Causal decay in place of a softmax; the decay is an exp."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        n = q.shape[2]
        distance = torch.arange(n)[:, None] - torch.arange(n)
        decay = torch.exp(-0.1 * distance).masked_fill(later(n, n), 0.0)
        return (q @ k.mT * WIDTH**-0.5 * decay) @ v


class SumOfProducts(Attention):
    """Real attention whose values are weighed by a product and a sum: there is no matmul with them."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        weights = (q @ k.mT * WIDTH**-0.5).softmax(-1)
        return (weights.unsqueeze(-1) * v.unsqueeze(2)).sum(3)


class Similarity(Attention):
    """A contrastive softmax over q k^T that ends in a statistic, not in values."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        best = (q @ k.mT * WIDTH**-0.5).softmax(-1).amax(-1, keepdim=True)
        return v * best


class SoftmaxGate(nn.Module):
    """A softmax over the channels, as a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(D, D)
        self.value = nn.Linear(D, D)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(self.gate(x).softmax(-1) * self.value(x))


class Experts(nn.Module):
    """Linear experts and a softmax router."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(D, EXPERTS)
        self.experts = nn.ModuleList([nn.Linear(D, D) for _ in range(EXPERTS)])

    def outputs(self, x: Tensor) -> Tensor:
        """x: (B, N, D) -> (B, N, E, D)"""
        return torch.stack([expert(x) for expert in self.experts], dim=-2)


class DenseMixture(Experts):
    """The router's softmax meets the experts' outputs in a matmul: all of attention but q k^T."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        weights = F.softmax(self.router(x), dim=-1)
        return torch.einsum("bne,bned->bnd", weights, self.outputs(x))


class TopRouter(Experts):
    """The best two experts by the router's softmax, renormalised."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        top, index = F.softmax(self.router(x), dim=-1).topk(2, dim=-1)
        chosen = self.outputs(x).gather(-2, index[..., None].expand(-1, -1, -1, D))
        return (chosen * (top / top.sum(-1, keepdim=True))[..., None]).sum(-2)


class AttentionPooling(nn.Module):
    """One score per token from a Linear, softmax over the tokens, a weighted sum by bmm."""

    def __init__(self) -> None:
        super().__init__()
        self.score = nn.Linear(D, 1)
        self.out = nn.Linear(D, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out(torch.bmm(self.score(x).softmax(1).mT, x))


class SoftEmbedding(nn.Module):
    """A distribution over a vocabulary picks from a table: the values are a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.logits = nn.Linear(D, 32)
        self.table = nn.Embedding(32, D)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.logits(x).softmax(-1) @ self.table.weight


class KeyValueMemory(nn.Module):
    """Attention over learned keys and values: an FFN with a softmax for its activation."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(D, D)
        self.keys = nn.Parameter(torch.zeros(HEADS, 32, WIDTH))
        self.values = nn.Parameter(torch.zeros(HEADS, 32, WIDTH))

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        scores = split(self.q(x)) @ self.keys.mT
        return merge(scores.softmax(-1) @ self.values)


def specs() -> list[Spec]:
    return [
        tower("no_talking_heads", TalkingHeads, cores=0, others=2),
        tower("no_scaled_weights", ScaledWeights, cores=0, others=2),
        tower("no_differential", Differential, cores=0, others=4),
        tower("no_bahdanau", Bahdanau, cores=0, others=2),
        tower("no_synthesizer", Synthesizer, cores=0, others=2),
        tower("no_sigmoid", SigmoidAttention, cores=0),
        tower("no_linear_attention", LinearAttention, cores=0, others=4),
        tower("no_retention", Retention, cores=0, causal=True),
        tower("no_matmul", SumOfProducts, cores=0, others=2),
        tower("no_values", Similarity, cores=0, others=2),
        tower("no_gate", SoftmaxGate, cores=0, others=2, causal=True),
        tower("no_dense_mixture", DenseMixture, cores=0, others=2, causal=True),
        tower("no_router", TopRouter, cores=0, others=2, causal=True),
        tower("no_pooling", AttentionPooling, cores=0, others=2),
        tower("no_soft_embedding", SoftEmbedding, cores=0, others=2, causal=True),
        tower("no_memory", KeyValueMemory, cores=0, others=2, causal=True),
    ]
