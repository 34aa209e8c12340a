"""Hooks of modules while a graph is made of them: those of users are silent, those that make weights are traced."""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

TABLES = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")
_RECORDERS = "transformers.utils.output_capturing"
_MAKES_WEIGHTS = (WeightNorm, SpectralNorm, BasePruningMethod)


def makes_weights(hook: Any) -> str:
    """The name of the weight that a pre-hook of torch computes before each call, "" for every other hook.

    Such a hook (torch.nn.utils.weight_norm, spectral_norm, prune) is a part of the module's own arithmetic.
    """
    if not isinstance(hook, _MAKES_WEIGHTS):
        return ""
    return str(getattr(hook, "name", None) or getattr(hook, "_tensor_name", ""))


def made_weights(module: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of a module that pre-hooks of torch made on its last call; plain attributes of the module."""
    names = (makes_weights(hook) for hook in module._forward_pre_hooks.values())
    return {name: vars(module)[name] for name in names if name and name in vars(module)}


def is_recorder(hook: Any) -> bool:
    """Whether a hook is one of those that transformers installs for good to record hidden states and attentions."""
    return getattr(hook, "__module__", "") == _RECORDERS


def collector() -> Any:
    """What the recorders of transformers write to now; None or empty outside of calls that ask for these values."""
    return sys.modules[_RECORDERS]._active_collector.get() if _RECORDERS in sys.modules else None


@contextmanager
def hooks_kept(root: nn.Module) -> Generator[None]:
    """The hooks inside ``root`` are afterwards those of before: transformers installs recorders on a first call."""
    tables = [vars(module)[name] for module in root.modules() for name in TABLES]
    before = [dict(table) for table in tables]
    try:
        yield
    finally:
        for table, hooks in zip(tables, before, strict=True):
            if table != hooks:
                table.clear()
                table.update(hooks)


@contextmanager
def silenced(root: nn.Module) -> Generator[None]:
    """The hooks inside ``root`` are not called for a while; those that make weights are, and what these made is put
    back.

    The recorders of transformers are, too, but write to nothing that the caller collects: a forward that collects
    hidden states is traced with them.
    """
    with ExitStack() as stack:
        stack.enter_context(hooks_kept(root))
        if collector():
            active = sys.modules[_RECORDERS]._active_collector
            stack.callback(active.reset, active.set(None))
        for module in root.modules():
            if made := made_weights(module):
                stack.callback(vars(module).update, made)
            for name in TABLES:
                table = vars(module)[name]
                for number in [n for n, hook in table.items() if not (makes_weights(hook) or is_recorder(hook))]:
                    del table[number]
        yield
