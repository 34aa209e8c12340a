"""The linear layers of Qwen3-Next: projections, convolutions and gates of a gated delta rule under its names."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.handoff.delta import DeltaNet
from gatecc.handoff.source import Source
from gatecc.handoff.unfit import UnfitError

_NORMS = ("q_norm.weight", "k_norm.weight")  # a linear layer reads queries and keys before them


def delta_options(source: Source) -> dict[str, Any]:
    """Which layers are linear, and their sizes. Raises UnfitError."""
    linear = [f"{layer}.self_attn" in source.deltas for layer in source.layers]
    kinds = {"layer_types": ["linear_attention" if one else "full_attention" for one in linear]}
    if not source.deltas:
        return kinds
    shapes = {net.shape for net in source.deltas.values()}
    if len(shapes) > 1:
        raise UnfitError(f"its linear layers are alike, the model's have (heads, width, taps, eps) {sorted(shapes)}")
    heads, width, taps, eps = shapes.pop()
    if eps != source.config.rms_norm_eps:
        raise UnfitError(
            f"its norms have one eps, the model's {source.config.rms_norm_eps} and {eps} in linear layers: convert "
            f"with gated-delta-net(form='qwen3-next', eps={source.config.rms_norm_eps})"
        )
    if source.config.hidden_act != "silu":
        raise UnfitError(
            f"its linear layers have the activation of its MLPs, the model's SiLU and {source.config.hidden_act}"
        )
    if any(net.gate is None for net in source.deltas.values()):
        raise UnfitError("its linear layers have an output gate: gated-delta-net(form='qwen3-next', gate=True)")
    if all(linear):
        raise UnfitError("its KV cache needs a layer of softmax attention, the model has none: keep=0 keeps the first")
    return {
        **kinds,
        "linear_num_key_heads": heads,
        "linear_num_value_heads": heads,
        "linear_key_head_dim": width,
        "linear_value_head_dim": width,
        "linear_conv_kernel_dim": taps,
    }


def with_deltas(source: Source, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict with its linear layers in the place of their attention."""
    found = dict(state)
    for name, net in source.deltas.items():
        own = {leaf: found.pop(leaf) for leaf in [n for n in found if n.startswith(f"{name}.")]}
        parts = {leaf.removeprefix(f"{name}."): x for leaf, x in own.items()}
        if not {"q_proj.weight", "k_proj.weight", "v_proj.weight", "o_proj.weight"} <= parts.keys():
            raise UnfitError(f"it has q_proj, k_proj, v_proj and o_proj, {name} of the model has {sorted(parts)}")
        layer = name.removesuffix("self_attn") + "linear_attn"
        found |= {f"{layer}.{leaf}": x for leaf, x in _layer(net, parts).items()}
        rest = parts.keys() - {f"{one}_proj.weight" for one in "qkvo"} - set(_NORMS)
        found |= {f"{name}.{leaf}": parts[leaf] for leaf in rest}  # biases: the class has none, which is said
    return found


def _layer(net: DeltaNet, parts: dict[str, Tensor]) -> dict[str, Tensor]:
    """A linear layer: rows of a head's query, key, value and gate, in turn. Each query head has keys of its own."""
    assert net.gate is not None

    def heads(x: Tensor, count: int) -> Tensor:
        return x.unflatten(0, (count, -1)).repeat_interleave(net.heads // count, 0)

    q, z = heads(parts["q_proj.weight"], net.heads), heads(net.gate, net.heads)
    k, v = (heads(parts[f"{one}_proj.weight"], net.kv_heads) for one in "kv")
    of_q, *of_kv = net.convs
    convs = [of_q, *(heads(conv, net.kv_heads).flatten(0, 1) for conv in of_kv)]
    return {
        "in_proj_qkvz.weight": torch.cat([q, k, v, z], 1).flatten(0, 1),
        "in_proj_ba.weight": torch.stack([net.beta, net.rate], 1).flatten(0, 1),
        "conv1d.weight": torch.cat(convs),
        "dt_bias": net.rate_bias,
        "A_log": net.log_a,
        "norm.weight": net.norm,
        "out_proj.weight": parts["o_proj.weight"],
    }
