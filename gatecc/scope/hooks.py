"""Hooks on submodules of a scope: which of them act, and how a variant calls them at the places that its graph knows.

A variant calls a hook where the module's own forward would: what goes in is known, what came out is known, and readers
read what the hook returns. So hooks of every kind work, also those that change what they see.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as torch_module
from torch.utils import _pytree as pytree
from torch.utils.hooks import BackwardHook

from gatecc.capture.signature import OpaqueArgumentError
from gatecc.capture.wrappers import wrapper_of
from gatecc.errors import CallNotCapturedError
from gatecc.ir.boundary import Boundary, Slot
from gatecc.ir.hooks import TABLES, collector, is_recorder, makes_weights

UNSEEN = "_gatecc_unseen"  # an attribute of hooks that are not meant for the inside of a scope
_CHECKPOINT = "torch.distributed._composable.checkpoint_activation"
_GLOBAL = tuple("_global" + name for name in TABLES)


def acts(hook: Any) -> bool:
    """Whether a hook is to be called now. Recorders of transformers do nothing unless somebody collects."""
    if getattr(hook, UNSEEN, False) or makes_weights(hook):
        return False
    return not is_recorder(hook) or bool(collector())


def hooked(root: nn.Module) -> tuple[str, ...]:
    """The submodules whose hooks are to be called. Hooks that torch calls for every module count for each of them."""
    everywhere = any(acts(hook) for name in _GLOBAL for hook in vars(torch_module)[name].values())
    found = [(name, m) for name, m in root.named_modules() if name and (everywhere or _has_acting(m))]
    for name, module in found:
        _check_wrapper(name, module)
    return tuple([name for name, _ in found])


def _check_wrapper(name: str, module: nn.Module) -> None:
    """Raise OpaqueArgumentError, or CallNotCapturedError, if hooks of a submodule belong to a wrapper.

    A graph of the scope around it could not be captured from shards, and would not be recomputed region by region.
    """
    wrapper = wrapper_of(module)
    if wrapper is not None:
        raise OpaqueArgumentError(
            f"{wrapper.name} on the submodule {name}, which lies inside the scope",
            do='wrap the scope or what lies around it, nothing inside; without scope="model" scopes are smaller',
        )
    if any(getattr(h, "__module__", "") == _CHECKPOINT for h in module._forward_pre_hooks.values()):
        raise CallNotCapturedError(
            "gradient checkpointing inside a scope: the graph of the scope would keep every activation",
            where=name,
            found="torch.distributed._composable.checkpoint on this submodule",
            expected="checkpointing of the scope itself, or of modules around it",
            do='checkpoint the scope or what lies around it; without scope="model" scopes are smaller',
        )


def _has_acting(module: nn.Module) -> bool:
    tables = module.__dict__
    return any(acts(hook) for name in TABLES for hook in tables[name].values())


def has_global_hooks() -> bool:
    """Whether somebody has asked torch to call a hook for every module."""
    return bool(
        torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )


def weight_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The pre-hooks of a module that make weights: they are traced, so a graph bakes them in."""
    return tuple([(type(h), makes_weights(h)) for h in module._forward_pre_hooks.values() if makes_weights(h)])


def own_forward(module: nn.Module) -> Any:
    """What a graph bakes in of a forward that was put on a submodule itself, in place of that of its class.

    Raises OpaqueArgumentError for hooks of accelerate that do something on every call; a hook that only moves tensors
    to the device where they are does nothing.
    """
    hook = module.__dict__.get("_hf_hook")
    if hook is None:
        forward = module.__dict__["forward"]
        return getattr(forward, "__func__", forward)
    for one in getattr(hook, "hooks", (hook,)):
        if type(one).__name__ != "AlignDevicesHook" or one.offload:
            raise OpaqueArgumentError(
                f"{type(one).__name__} of accelerate on the submodule {type(module).__name__}",
                do="offload the scope as one: preload_module_classes=[its class] of accelerate's dispatch_model and "
                "cpu_offload",
            )
    return type(hook)


Enter = Callable[[nn.Module, Sequence[torch.Tensor]], tuple[Any, ...]]
Leave = Callable[[nn.Module, Any, Sequence[torch.Tensor]], tuple[Any, ...]]


def entering(boundary: Boundary, where: str) -> Enter:
    """A function that calls what torch calls before a forward: the tensors that go in, and last what leaving needs."""
    spec, leaves = boundary.spec, boundary.leaves

    def enter(module: nn.Module, values: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        args, kwargs = pytree.tree_unflatten(_filled(leaves, values), spec)
        for number, hook in (*torch_module._global_forward_pre_hooks.items(), *module._forward_pre_hooks.items()):
            if makes_weights(hook):
                continue
            if number in module._forward_pre_hooks_with_kwargs:
                changed = hook(module, args, kwargs)
                args, kwargs = (args, kwargs) if changed is None else changed
            else:
                changed = hook(module, args)
                args = args if changed is None else changed if isinstance(changed, tuple) else (changed,)
        backward = _backward_hook(module)
        args = backward.setup_input_hook(args) if backward else args
        return (*_tensors((args, kwargs), spec, leaves, values, where, "takes"), (args, kwargs, backward))

    return enter


def leaving(boundary: Boundary, where: str) -> Leave:
    """A function that calls what torch calls after a forward: the tensors that come out."""
    spec, leaves = boundary.spec, boundary.leaves

    def leave(module: nn.Module, entered: Any, values: Sequence[torch.Tensor]) -> tuple[Any, ...]:
        args, kwargs, backward = entered
        output = pytree.tree_unflatten(_filled(leaves, values), spec)
        for number, hook in (*torch_module._global_forward_hooks.items(), *module._forward_hooks.items()):
            keywords = number in module._forward_hooks_with_kwargs
            if keywords or number in torch_module._global_forward_hooks_with_kwargs:
                changed = hook(module, args, kwargs, output)
            else:
                changed = hook(module, args, output)
            output = output if changed is None else changed
        output = backward.setup_output_hook(output) if backward else output
        _partial_backward_hooks(module, args, output)
        return _tensors(output, spec, leaves, values, where, "returns")

    return leave


def _filled(leaves: Sequence[Any], values: Sequence[torch.Tensor]) -> list[Any]:
    return [values[leaf.number] if isinstance(leaf, Slot) else leaf for leaf in leaves]


def _backward_hook(module: nn.Module) -> BackwardHook | None:
    before = [*torch_module._global_backward_pre_hooks.values(), *module._backward_pre_hooks.values()]
    full: list[Any] = []
    if torch_module._global_is_full_backward_hook is True:
        full += torch_module._global_backward_hooks.values()
    if module._is_full_backward_hook is True:
        full += module._backward_hooks.values()
    return BackwardHook(module, full, before) if full or before else None


def _partial_backward_hooks(module: nn.Module, args: Any, output: Any) -> None:
    """Hooks of the old kind (register_backward_hook), which torch puts on the operator that made the output."""
    if not (torch_module._global_backward_hooks or module._backward_hooks):
        return
    hooks = module._get_backward_hooks()[1]
    found = next((x for x in pytree.tree_leaves(output) if isinstance(x, torch.Tensor)), None)
    if not hooks or found is None or found.grad_fn is None:
        return
    for hook in hooks:
        found.grad_fn.register_hook(torch_module._WrappedHook(hook, module))
    module._maybe_warn_non_full_backward_hook(args, output, found.grad_fn)


def _tensors(
    tree: Any, spec: pytree.TreeSpec, leaves: Sequence[Any], values: Sequence[torch.Tensor], where: str, verb: str
) -> tuple[torch.Tensor, ...]:
    """The tensors of what hooks returned. Raises CallNotCapturedError where these are not of the kind of before."""
    flat, found = pytree.tree_flatten(tree)
    new = list(values)
    alike = found == spec
    for leaf, old in zip(flat, leaves, strict=False):
        if not isinstance(old, Slot):
            alike = alike and (leaf is old or leaf == old)
        elif isinstance(leaf, torch.Tensor):
            before = values[old.number]
            alike = alike and leaf.dtype == before.dtype and leaf.shape == before.shape
            new[old.number] = leaf
        else:
            alike = False
    if not alike:
        raise CallNotCapturedError(
            f"a hook changes what a submodule of a scope {verb} into something of another kind",
            where=where,
            found="another structure, shape, dtype or constant than that of the call without hooks",
            do="let the hook return tensors of the same shapes and dtypes in the same places, or take it off",
        )
    return tuple(new)
