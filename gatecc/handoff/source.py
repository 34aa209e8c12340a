"""Source: a rewritten model of transformers as the architectures of transformers see it: its layers, and what was done
to them, in tensors."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.handoff.attention import AttentionGate, attention_gate
from gatecc.handoff.delta import DeltaNet, delta_net, with_gate
from gatecc.handoff.mixture import Mixture, mixture
from gatecc.handoff.unfit import UnfitError
from gatecc.ir.weights import joined
from gatecc.passes.fuse_experts import FuseExperts
from gatecc.passes.gate import Gate
from gatecc.passes.mix.mix import Mix
from gatecc.passes.route.route import Route
from gatecc.scope.state import Scope, scopes

# What configurations of decoders name alike. A target takes those that it has.
_SHARED = (
    "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads head_dim hidden_act "
    "max_position_embeddings initializer_range rms_norm_eps tie_word_embeddings rope_parameters attention_dropout "
    "use_cache sliding_window use_sliding_window max_window_layers layer_types"
).split()
_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")  # None says that there is none, not that it is the usual one


@dataclass
class Source:
    """``mixtures``, ``gates`` and ``deltas``: by the name of the module that they belong to. ``rest``: the state dict
    without what is in them. ``name``: what transformers calls the class without its architecture: "ForCausalLM"."""

    model: Any
    name: str
    mixtures: dict[str, Mixture] = field(default_factory=dict[str, Mixture])
    gates: dict[str, AttentionGate] = field(default_factory=dict[str, AttentionGate])
    deltas: dict[str, DeltaNet] = field(default_factory=dict[str, DeltaNet])
    rest: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def config(self) -> Any:
        return self.model.config

    @property
    def shared(self) -> dict[str, Any]:
        """The options that every decoder's configuration has, as far as this one sets them."""
        config = self.config
        found = {name: getattr(config, name) for name in _SHARED if getattr(config, name, None) is not None}
        return found | {name: getattr(config, name, None) for name in _TOKENS}

    @property
    def layers(self) -> list[str]:
        """The names of the layers, first to last."""
        lists = [(name, m) for name, m in self.model.named_modules() if isinstance(m, nn.ModuleList)]
        name, held = next(((n, m) for n, m in lists if n.rpartition(".")[2] == "layers"), ("", nn.ModuleList()))
        return [f"{name}.{number}" for number in range(len(held))]

    def mixture_of(self, layer: str) -> Mixture | None:
        """The experts of a layer; None where it is dense."""
        return self.mixtures.get(f"{layer}.mlp")

    @property
    def dense(self) -> list[int]:
        """The numbers of the layers that have no experts."""
        return [number for number, layer in enumerate(self.layers) if self.mixture_of(layer) is None]


def read(model: Any) -> Source:
    """What a model is. Raises UnfitError for a rewrite that no architecture computes."""
    names = [type(model).__name__, *(c.__name__ for c in type(model).__mro__)]
    prefix = type(model.config).__name__.removesuffix("Config")
    source = Source(model, next((n.removeprefix(prefix) for n in names if n.startswith(prefix)), ""))
    taken: list[str] = []
    applied = [found for fqn, _, state in scopes(model) for found in _applied(fqn, state)]
    for owner, rewrite in sorted(applied, key=lambda found: not isinstance(found[1], Mix)):  # a gate may be a mixer's
        taken += _read(source, owner, rewrite)
    if not source.mixtures and not source.gates and not source.deltas:
        raise UnfitError("it has no experts, gates or mixers that gatecc made: save_pretrained writes what it is")
    state = model.state_dict()
    source.rest = {n: t for n, t in state.items() if not any(n.startswith(f"{prefix}.") for prefix in taken)}
    return source


def _applied(fqn: str, state: Scope) -> Iterator[tuple[str, Any]]:
    """The owners of sites with the rewrites that were done there."""
    for application in state.applied:
        for owner, _ in application.sites:
            yield joined(fqn, owner), application.rewrite


def _read(source: Source, owner: str, rewrite: Any) -> list[str]:
    """Take in one rewrite; the names of the modules that it brought."""
    if isinstance(rewrite, FuseExperts):
        return []  # the function is as it was
    module = source.model.get_submodule(owner)
    try:
        if isinstance(rewrite, Route) and owner not in source.mixtures:
            source.mixtures[owner] = mixture(module, rewrite)
            return [f"{owner}.{name}" for name in ("router", rewrite.label, "shared", "shared_gate")]
        if isinstance(rewrite, Mix) and owner not in source.deltas:
            source.deltas[owner] = delta_net(module, rewrite)
            return [f"{owner}.{rewrite.label}"]
        if isinstance(rewrite, Gate) and owner in source.deltas:
            source.deltas[owner] = with_gate(source.deltas[owner], module, rewrite)
            return [f"{owner}.{rewrite.label}"]
        if isinstance(rewrite, Gate) and owner not in source.gates:
            source.gates[owner] = attention_gate(module, rewrite)
            return [f"{owner}.{rewrite.label}"]
    except UnfitError as e:
        raise UnfitError(f"{owner}: {e}") from e
    raise UnfitError(f"{owner}: {rewrite} is no part of an architecture")


def zeros_like(x: Tensor, *sizes: int) -> Tensor:
    """Zeros on the device and in the dtype of a weight."""
    return torch.zeros(sizes, dtype=x.dtype, device=x.device)
