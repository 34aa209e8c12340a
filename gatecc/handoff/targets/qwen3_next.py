"""Qwen3-Next: a Qwen3 whose heads are gated, element by element, before the output projection, or whose attention is a
gated delta rule; with experts beside a shared one, in some layers, in all or in none."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.handoff.attention import AttentionGate
from gatecc.handoff.linear_layers import delta_options, with_deltas
from gatecc.handoff.shared_expert import shared_options, shared_state
from gatecc.handoff.source import Source, zeros_like
from gatecc.handoff.target import Target, alike, stacked
from gatecc.handoff.unfit import UnfitError

_PARTS = ("q_proj.weight", "k_proj.weight", "q_norm.weight")
_NORMS = ("norm.weight", "q_norm.weight", "k_norm.weight")  # they hold what is added to 1


class Qwen3Next(Target):
    """In layers of softmax attention the query projection yields query and gate of a head in turn; where the model
    has no gate, it is half of twice the heads."""

    name = "qwen3_next"
    prefix = "Qwen3Next"

    def options(self, source: Source) -> dict[str, Any]:
        mixed = bool(source.mixtures)
        kept = _kept(source)
        if not all(f"{name}.{part}" in source.rest for name in kept for part in _PARTS):
            raise UnfitError("its softmax attention is q_proj, k_proj and q_norm in self_attn, the model's is not")
        if not source.gates.keys() <= set(kept):
            raise UnfitError(f"it gates self_attn of a layer, the model has gates in {', '.join(sorted(source.gates))}")
        return {
            **delta_options(source),
            **(shared_options(source, alike(source, dense=True, shared=True)) if mixed else {"num_experts": 0}),
            "partial_rotary_factor": 1.0,
            "intermediate_size": source.config.intermediate_size,
            "attention_bias": _biased(source),
        }

    def state(self, source: Source) -> dict[str, Tensor]:
        found = {name: x - 1 if name.endswith(_NORMS) else x for name, x in source.rest.items()}
        found |= stacked(source) | shared_state(source)
        found = with_deltas(source, found)
        for name in _kept(source):
            size = found[f"{name}.q_norm.weight"].size(0)
            found |= _attention(name, found, source.gates.get(name), size, biased=_biased(source))
        return found


def _kept(source: Source) -> list[str]:
    """The modules of softmax attention. Raises UnfitError where something else was replaced."""
    attentions = [f"{layer}.self_attn" for layer in source.layers]
    if not attentions or not source.deltas.keys() <= set(attentions):
        raise UnfitError("its mixers take the place of self_attn of a layer")
    return [name for name in attentions if name not in source.deltas]


def _biased(source: Source) -> bool:
    return any(gate.bias is not None for gate in source.gates.values()) or any(
        name.endswith("q_proj.bias") for name in source.rest
    )


def _attention(
    name: str, state: dict[str, Tensor], gate: AttentionGate | None, size: int, *, biased: bool
) -> dict[str, Tensor]:
    """The projections of an attention with its gate: rows of a head's query, then of its gate."""
    query, out = state[f"{name}.q_proj.weight"], state[f"{name}.o_proj.weight"]
    gate = gate or AttentionGate(torch.zeros_like(query), None, 2.0)
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
