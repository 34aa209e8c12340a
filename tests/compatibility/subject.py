"""The model that every cell transforms, and the recipes: a tiny Llama, whose new parameters are made random."""

from __future__ import annotations

import copy
import functools
import zlib
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from tests.copies import learning_alone

RECIPES: dict[str, tuple[str | gatecc.Recipe, Literal["auto", "model"]]] = {
    "gated-attention": ("gated-attention", "auto"),
    "residual-gates": ("residual-gates", "auto"),
    "gla": ("gla", "auto"),
    "liger": ("liger", "auto"),
    "upcycle": (gatecc.recipe("upcycle", experts=3, k=3), "auto"),  # all run: int8 noise would choose others
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


@dataclass(frozen=True)
class Rewrite:
    """A recipe, with new parameters that are random: by their name, whatever wrapper is around. No recipe, no rewrite:
    the control, what the library does with a model of its own.

    Not verified, so that the first call in each mode is the one that the cell makes. Cells share the transform of
    the base, and each learns by itself.
    """

    recipe: str = ""

    def __call__(self, model: nn.Module) -> nn.Module:
        """The model rewritten."""
        if not self.recipe:
            return model
        return learning_alone(_rewritten(self.recipe)) if _is_base(model) else _rewrite(model, self.recipe)

    def right(self) -> nn.Module:
        """The base rewritten, to compare with: it was called before."""
        return copy.deepcopy(_called(self.recipe)) if self.recipe else base()


@functools.cache
def _rewritten(recipe: str) -> nn.Module:
    return _rewrite(base(), recipe)


@functools.cache
def _called(recipe: str) -> nn.Module:
    model = learning_alone(_rewritten(recipe))
    model(**inputs())
    return model


def _is_base(model: nn.Module) -> bool:
    """Whether a model is as `base` made it: nothing of a wrapper in it."""
    made = _model()
    if [type(m) for m in model.modules()] != [type(m) for m in made.modules()]:
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return False
    state, its = model.state_dict(), made.state_dict()
    return state.keys() == its.keys() and all(torch.equal(x, its[name]) for name, x in state.items())


def _rewrite(model: nn.Module, recipe: str) -> nn.Module:
    name, scope = RECIPES[recipe]
    old = {n for n, _ in model.named_parameters()}
    changed = gatecc.transform(model, name, ((), {"input_ids": inputs()["input_ids"]}), scope=scope, verify=False)
    for n, p in changed.named_parameters():
        if n not in old:
            generator = torch.Generator().manual_seed(zlib.crc32(canonical(n).encode()))
            p.data.add_(torch.randn(p.shape, generator=generator))
    return changed


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradients of a model by canonical name, whole where they are sharded."""
    found = {canonical(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {f"grad {n}": whole(g).detach().clone() for n, g in found.items()}


def whole(x: Tensor) -> Tensor:
    """A sharded tensor in one piece."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # pyright: ignore[reportAttributeAccessIssue]
