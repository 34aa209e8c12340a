"""Qwen3-Next: a Qwen3 whose heads are gated, element by element, before the output projection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.handoff.attention import AttentionGate
from gatecc.handoff.source import Source, zeros_like
from gatecc.handoff.target import Target
from gatecc.handoff.unfit import UnfitError

_NORMS = ("norm.weight", "q_norm.weight", "k_norm.weight")  # they hold what is added to 1


class Qwen3Next(Target):
    """Dense layers of softmax attention alone. The query projection yields query and gate of a head in turn."""

    name = "qwen3_next"
    prefix = "Qwen3Next"

    def options(self, source: Source) -> dict[str, Any]:
        if source.mixtures:
            raise UnfitError("gatecc hands gated attention to it in dense layers alone")
        missing = [layer for layer in source.layers if f"{layer}.self_attn" not in source.gates]
        if missing or len(source.gates) != len(source.layers):
            raise UnfitError(f"its attention is gated in every layer, the model's not in {', '.join(missing)}")
        config = source.config
        if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
            raise UnfitError("its attention has no sliding window")
        return {
            "num_experts": 0,
            "layer_types": ["full_attention"] * len(source.layers),
            "partial_rotary_factor": 1.0,
            "intermediate_size": config.intermediate_size,
            "attention_bias": _biased(source),
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        found = {name: x - 1 if name.endswith(_NORMS) else x for name, x in source.rest.items()}
        for layer in source.layers:
            name = f"{layer}.self_attn"
            found |= _attention(name, found, source.gates[name], source.config.head_dim, biased=_biased(source))
        return found


def _biased(source: Source) -> bool:
    return any(gate.bias is not None for gate in source.gates.values()) or any(
        name.endswith("q_proj.bias") for name in source.rest
    )


def _attention(
    name: str, state: dict[str, Tensor], gate: AttentionGate, size: int, *, biased: bool
) -> dict[str, Tensor]:
    """The projections of an attention with its gate: rows of a head's query, then of its gate."""
    query, out = state[f"{name}.q_proj.weight"], state[f"{name}.o_proj.weight"]
    made = {f"{name}.q_proj.weight": _in_turn(query, gate.weight, size), f"{name}.o_proj.weight": out * gate.scale}
    if not biased:
        return made
    for part in ("q", "k", "v", "o"):
        weight = state[f"{name}.{part}_proj.weight"]
        bias = state.get(f"{name}.{part}_proj.bias")
        made[f"{name}.{part}_proj.bias"] = zeros_like(weight, weight.size(0)) if bias is None else bias
    own = zeros_like(query, query.size(0)) if gate.bias is None else gate.bias
    made[f"{name}.q_proj.bias"] = _in_turn(made[f"{name}.q_proj.bias"], own, size)
    return made


def _in_turn(query: Tensor, gate: Tensor, size: int) -> Tensor:
    return torch.cat([query.unflatten(0, (-1, size)), gate.unflatten(0, (-1, size))], 1).flatten(0, 1)
