"""Key: everything that a graph bakes in, of the call and of the module; a call with another key is another variant."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils import _device

from gatecc.capture.reads import same
from gatecc.capture.signature import Key, OpaqueArgumentError, autocast, flatten
from gatecc.scope.hooks import has_global_hooks, hooked, own_forward, weight_hooks
from gatecc.scope.variant import Variant


def call_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, list[torch.Tensor]]:
    """Everything that a graph bakes in: the call's structure and constants, grad mode, autocast, torch's defaults, the
    state of each submodule.

    Last the submodules whose hooks are to be called (`hooked_in`).

    Raises OpaqueArgumentError if an argument, or the forward of a submodule, cannot be part of a graph.
    """
    key, leaves = flatten(args, kwargs)
    state: list[Any] = []
    hooks: list[Any] = []
    _walk(module, state, hooks)
    if not leaves:
        raise OpaqueArgumentError("a call without tensor arguments")
    defaults = (torch.get_default_dtype(), _device.CURRENT_DEVICE, torch.are_deterministic_algorithms_enabled())
    called = hooked(module) if hooks or has_global_hooks() else ()
    return (key, torch.is_grad_enabled(), autocast(leaves), defaults, tuple(state), called), leaves


def hooked_in(key: Key) -> tuple[str, ...]:
    """The submodules whose hooks a call with this key is to call."""
    return key[-1]


def _walk(root: nn.Module, out: list[Any], hooks: list[Any]) -> None:
    """Type and training flag of every submodule, and dtype, device and shape of its tensors: swapped submodules (LoRA),
    frozen norms, casts and other weights change the graph. Read from ``__dict__``, which costs half of attributes.

    Hooks and forwards of a submodule's own are part of its code; ``hooks`` gets the modules that have any hook.
    """
    modules = [root]
    for module in modules:  # it grows
        own = module.__dict__
        if module is not root:
            if (
                own["_forward_hooks"]
                or own["_forward_pre_hooks"]
                or own["_backward_hooks"]
                or own["_backward_pre_hooks"]
            ):
                hooks.append(module)
                out.extend(weight_hooks(module))
            if "forward" in own:
                out.append(own_forward(module))
        out += (type(module), own["training"])
        for tensors in (own["_parameters"], own["_buffers"]):
            if tensors:
                for tensor in tensors.values():
                    if tensor is not None:
                        out += (tensor.dtype, tensor.device, tensor.shape)
        if children := own["_modules"]:
            out.append(len(children))
            modules += [child for child in children.values() if child is not None]


def fresh(variant: Variant, module: nn.Module) -> bool:
    """Whether the plain attributes that the capture read still have the values that it baked in, and what was one
    parameter still is."""
    for steps, rows in variant.groups:
        holder: Any = module
        for step in steps:
            holder = holder._modules[step]
        for names, value, fixed, read in rows:
            now = holder
            for name in names:
                now = getattr(now, name, None)
            if (now is not value or not fixed) and not same(read, now):
                return False
    return all(_parameter(module, first) is _parameter(module, second) for first, second in variant.ties)


def _parameter(module: nn.Module, path: tuple[str, ...]) -> Any:
    holder: Any = module
    for step in path[:-1]:
        holder = holder._modules[step]
    return holder._parameters[path[-1]]
