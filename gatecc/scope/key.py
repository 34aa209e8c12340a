"""Key: everything that a graph bakes in, of the call and of the module; a call with another key is another variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gatecc.capture.reads import Read
from gatecc.capture.signature import Key, OpaqueArgumentError, autocast, flatten


def call_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, list[torch.Tensor]]:
    """Everything that a graph bakes in: the call's structure and constants, grad mode, autocast, the state of each
    submodule.

    Raises OpaqueArgumentError if an argument, or a hook inside the scope, cannot be part of a graph.
    """
    key, leaves = flatten(args, kwargs)
    modes: list[Any] = []
    _modes(module, modes, True)
    if not leaves:
        raise OpaqueArgumentError("a call without tensor arguments")
    return (key, torch.is_grad_enabled(), autocast(leaves), tuple(modes)), leaves


def _modes(module: nn.Module, out: list[Any], root: bool) -> None:
    """Type and training flag of every submodule: swapped submodules (LoRA) and frozen norms change the graph."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not root and any(hooks):
        raise OpaqueArgumentError(f"a hook on the submodule {type(module).__name__}")
    out.append(type(module))
    out.append(module.training)
    for child in module._modules.values():
        if child is not None:
            _modes(child, out, False)


def fresh(reads: tuple[Read, ...], module: nn.Module) -> bool:
    """Whether the plain attributes that the capture read still have the values that it baked in."""
    for path, name, value in reads:
        holder = module.get_submodule(path) if path else module
        now = getattr(holder, name, None)
        if now is not value and _differs(now, value):
            return False
    return True


def _differs(now: Any, before: Any) -> bool:
    """Tensors have no one truth value, nor have containers of them: other objects then count as other values."""
    try:
        return isinstance(now, torch.Tensor) or bool(now != before)
    except (RuntimeError, ValueError):
        return True
