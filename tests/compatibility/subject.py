"""The model that every cell transforms, and the recipes: a tiny Llama, whose new parameters are made random."""

from __future__ import annotations

import copy
import functools
import zlib
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc

Rewrite = Callable[[nn.Module], nn.Module]
RECIPES: dict[str, tuple[str, Literal["auto", "model"]]] = {
    "gated-attention": ("gated-attention", "auto"),
    "residual-gates": ("residual-gates", "auto"),
    "gla": ("gla", "auto"),
    "liger": ("liger", "auto"),
    "gated-attention, whole model": ("gated-attention", "model"),
}
# What the wrappers put before or between the names of parameters.
PREFIXES = ("_orig_mod.", "base_model.model.", "base_layer.", "module.")


@functools.cache
def _model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        use_cache=False,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # logits of about 1, so that differences show
        for p in model.parameters():
            p.mul_(6.0) if p.dim() > 1 else p
    return model


def base() -> nn.Module:
    """A model that was not transformed; each call gives the same weights."""
    return copy.deepcopy(_model())


def inputs() -> dict[str, Any]:
    """Keyword arguments of a call with a loss: two rows of eight tokens."""
    ids = torch.randint(1, 61, (2, 8), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def canonical(name: str) -> str:
    """The name that a parameter has without wrappers."""
    for prefix in PREFIXES:
        name = name.replace(prefix, "")
    return name


def rewriting(recipe: str) -> Rewrite:
    """Transform by a recipe and make the new parameters random: by their name, whatever wrapper is around.

    Not verified, so that the first call in each mode is the one that the cell makes.
    """
    name, scope = RECIPES[recipe]

    def rewrite(model: nn.Module) -> nn.Module:
        old = {n for n, _ in model.named_parameters()}
        changed = gatecc.transform(model, name, ((), {"input_ids": inputs()["input_ids"]}), scope=scope, verify=False)
        for n, p in changed.named_parameters():
            if n not in old:
                generator = torch.Generator().manual_seed(zlib.crc32(canonical(n).encode()))
                p.data.add_(torch.randn(p.shape, generator=generator))
        return changed

    return rewrite


def unchanged(model: nn.Module) -> nn.Module:
    """The rewrite of the control: what the library does with a model of its own."""
    return model


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model by canonical name, whole where they are sharded."""
    found = {canonical(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {f"grad {n}": whole(g).detach().clone() for n, g in found.items()}


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore[reportAttributeAccessIssue]
