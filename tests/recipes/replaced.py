"""Real models, tiny, whose attention a reference does by hand: a module of Python in the place of each attention."""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.recipes.checks import new_parameters, randomise

ByHandFunction = Callable[[Any, Tensor, Any], Tensor]


class ByHand(nn.Module):
    """``function(attention, hidden, attention_mask)``; ``old`` is the attention with the mixer that was trained."""

    def __init__(self, old: nn.Module, function: ByHandFunction, pair: bool) -> None:
        super().__init__()
        self.old, self.function, self.pair = old, function, pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        out = self.function(self.old, hidden, kwargs.get("attention_mask"))
        return (out, None) if self.pair else out


def by_hand(plain: nn.Module, rewritten: nn.Module, paths: list[str], function: ByHandFunction) -> nn.Module:
    """The model of before, with ``function`` for the modules at ``paths``; it reads the rewritten model's weights."""
    model: Any = copy.deepcopy(plain)
    for path in paths:
        holder, _, name = path.rpartition(".")
        pair = not path.endswith(".attn")  # timm's attention returns a tensor, that of transformers a pair
        setattr(model.get_submodule(holder), name, ByHand(rewritten.get_submodule(path), function, pair))
    return model


def vit(**options: Any) -> nn.Module:
    """A vision transformer of timm: 16 patches of 8 by 8 and a class token, one block of 16 channels and 2 heads."""
    timm: Any = importlib.import_module("timm")
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, **(sizes | options)).eval()
    randomise(model.parameters(), 0.3)
    return model


def shaken(rewritten: nn.Module, plain: nn.Module) -> dict[str, nn.Parameter]:
    """The new parameters, with values that matter."""
    new = new_parameters(rewritten, plain)
    randomise(new.values(), 0.3)
    return new


def heads(x: Tensor, count: int) -> Tensor:
    """(B, N, H * D) -> (B, H, N, D)."""
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def merged(x: Tensor) -> Tensor:
    """(B, H, N, D) -> (B, N, H * D)."""
    return x.transpose(1, 2).flatten(2)


def gap(a: Any, b: Any) -> float:
    """The largest difference of two outputs."""
    first, other = (x if isinstance(x, Tensor) else x[0] for x in (a, b))
    return float((first - other).detach().abs().max())
