"""DeltaNet: an attention that became a gated delta rule, in the terms of the architectures of transformers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from gatecc.handoff.unfit import UnfitError
from gatecc.ir.gates.activation import Silu
from gatecc.ir.gates.scorer import Linear as LinearScorer
from gatecc.passes.gate import Gate
from gatecc.passes.mix.mix import Mix
from gatecc.passes.mix.mixers.decay import Scalar
from gatecc.passes.mix.mixers.features import UnitMap
from gatecc.passes.mix.mixers.linear import Linear, LinearMixer


@dataclass(frozen=True)
class DeltaNet:
    """After the projections of the attention, queries in ``heads``, keys and values in ``kv_heads``: ``convs`` of q, k
    and v (channels, 1, taps) and a SiLU, unit queries and keys, S <- e^g S + k (beta (v - e^g S^T k))^T with
    g = -exp(log_a) softplus(rate x + rate_bias) and beta = sigma(beta x), an RMS norm per head, and silu(gate x)."""

    heads: int
    kv_heads: int
    head_dim: int
    convs: tuple[Tensor, Tensor, Tensor]
    log_a: Tensor
    rate: Tensor
    rate_bias: Tensor
    beta: Tensor
    norm: Tensor
    eps: float
    gate: Tensor | None = None

    @property
    def taps(self) -> int:
        return self.convs[0].size(-1)

    @property
    def shape(self) -> tuple[int, int, int, float]:
        """What layers of one architecture have in common."""
        return self.heads, self.head_dim, self.taps, self.eps


def delta_net(layer: nn.Module, rewrite: Mix) -> DeltaNet:
    """What a mixer computes. Raises UnfitError for one that no architecture has."""
    mixer, made = rewrite.mixer, getattr(layer, rewrite.label, None)
    if not isinstance(mixer, Linear) or not isinstance(made, LinearMixer):
        raise UnfitError(f"the mixer {mixer.tag}, which no architecture has")
    wanted = Linear(
        UnitMap(smooth=True), Scalar(), rule="delta", norm="rms", activation="silu", linear=True, conv=mixer.conv
    )
    start = mixer.decay.start if isinstance(mixer.decay, Scalar) else "published"
    fits = replace(wanted, decay=Scalar(start), norm_weight=mixer.norm_weight, norm_eps=mixer.norm_eps)
    if mixer != fits or not mixer.conv:
        raise UnfitError(f"{mixer}, in the place of gated-delta-net(form='qwen3-next')")
    parts: Any = made
    place, decay = parts.place, parts.decays[0]
    if place.key != place.value:
        raise UnfitError(f"keys of {place.key} channels and values of {place.value}")
    q, k, v = (conv.weight.detach() for conv in parts.convs)
    rate, rate_bias = decay.rate.weight.detach(), decay.rate.bias.detach()
    beta, norm = parts.beta.weight.detach(), parts.norm.weight.detach()
    sizes = place.heads, place.kv_heads, place.key
    return DeltaNet(*sizes, (q, k, v), decay.log_a.detach(), rate, rate_bias, beta, norm, mixer.norm_eps)


def with_gate(found: DeltaNet, layer: nn.Module, gate: Gate) -> DeltaNet:
    """With the gate on its heads. Raises UnfitError for one that no architecture has."""
    spec, site = gate.gate, gate.site
    fits = (site.kind, site.stage, gate.op, gate.where) == ("attention", "heads", "mul", "")
    fits = fits and (str(spec.source), str(spec.granularity)) == ("hidden", "element")
    if not fits or spec.scorer != LinearScorer(bias=False) or not isinstance(spec.activation, Silu) or spec.fuse_into:
        raise UnfitError(f"the gate {spec}, in the place of silu(W hidden) for each element of the heads")
    module: Any = getattr(layer, gate.label)
    if module.activation != Silu() or found.gate is not None:
        raise UnfitError(f"a gate with {module.activation}, where the architecture has one plain SiLU")
    return replace(found, gate=module.weight.detach())
