"""AttentionGate: a sigmoid on the heads of an attention, in the terms of the architectures of transformers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gatecc.handoff.unfit import UnfitError
from gatecc.ir.gates.activation import Sigmoid
from gatecc.ir.gates.scorer import Linear
from gatecc.passes.gate import Gate


@dataclass(frozen=True)
class AttentionGate:
    """``heads * scale * sigma(weight x + bias)`` for each element; x is what the query projection reads, ``weight``
    (h d, c), ``bias`` (h d,)."""

    weight: Tensor
    bias: Tensor | None
    scale: float


def attention_gate(layer: nn.Module, gate: Gate) -> AttentionGate:
    """What a gate computes. Raises UnfitError for one that no architecture has."""
    spec, site = gate.gate, gate.site
    if (site.kind, site.stage) != ("attention", "heads") or gate.op != "mul" or gate.where:
        raise UnfitError(f"a gate at {site}, where an architecture gates the heads of attention")
    module: Any = getattr(layer, gate.label)
    activation = module.activation
    fits = str(spec.source) == "hidden" and isinstance(spec.scorer, Linear) and str(spec.granularity) == "element"
    if not fits or not isinstance(activation, Sigmoid) or spec.fuse_into:
        raise UnfitError(f"the gate {spec}, in the place of one for each element by a matrix of its own and a sigmoid")
    if (activation.bias, activation.slope) != (0.0, 1.0):
        raise UnfitError(f"a gate with {activation}, where the architecture has a plain sigmoid")
    bias = getattr(module, "bias", None)
    return AttentionGate(module.weight.detach(), None if bias is None else bias.detach(), float(activation.scale))
