"""Adapters: the documented changes that gatecc makes to a library's behaviour while it captures, all undone afterwards.

- transformers: ``config.use_cache`` is False, so that no Cache object enters a graph (a captured cache loses its
update).
- transformers: ``experts_implementation`` is "grouped_mm" where the experts are run by a loop over those that were hit,
which depends on data, or by a kernel that no graph shows ("eager", "sonicmoe", "deepgemm"); they compute the same.
- torch: the fused fast path of nn.TransformerEncoder and nn.MultiheadAttention is off: it hides attention in one
operator.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

_HIDDEN_EXPERTS = ("eager", "sonicmoe", "deepgemm")


@contextmanager
def adapted(module: nn.Module) -> Generator[None]:
    """Apply every adapter to a module for the time of a capture or of a recording run."""
    with ExitStack() as stack:
        stack.enter_context(caches_off(module))
        stack.enter_context(experts_open(module))
        stack.enter_context(fast_path_off())
        yield


@contextmanager
def caches_off(module: nn.Module) -> Generator[None]:
    """Set ``use_cache`` to False on every configuration object in the module."""
    changed = switch_caches(module)
    try:
        yield
    finally:
        for config, value in changed:
            config.use_cache = value


Setting = tuple[Any, Any]  # a configuration and what its ``use_cache`` was


def switch_caches(module: nn.Module) -> list[Setting]:
    """Switch ``use_cache`` off for good; returns the configurations that had it on, with their settings."""
    changed = [(config, config.use_cache) for config in _configs(module, "use_cache") if config.use_cache]
    for config, _ in changed:
        config.use_cache = False
    return changed


@contextmanager
def experts_open(module: nn.Module, hidden: tuple[str, ...] = _HIDDEN_EXPERTS) -> Generator[bool]:
    """Run the experts of transformers in a way that a graph can show, with a free number of tokens.

    ``hidden`` are the implementations that give way to "grouped_mm". Yields whether there was one.
    """
    name = "_experts_implementation_internal"  # the property would set those of inner configurations too
    changed = [(config, getattr(config, name)) for config in _configs(module, name)]
    changed = [(config, value) for config, value in changed if value in hidden]
    for config, _ in changed:
        setattr(config, name, "grouped_mm")
    try:
        yield bool(changed)
    finally:
        for config, value in changed:
            setattr(config, name, value)


def _configs(module: nn.Module, setting: str) -> list[Any]:
    """The configurations with a setting, of a module and its submodules, with those inside of them: text, vision,
    encoder, decoder."""
    found: dict[int, Any] = {}
    seen: set[int] = set()
    todo = [m.__dict__.get("config") for m in module.modules()]
    while todo:
        config = todo.pop()
        if config is None or id(config) in seen or not hasattr(config, "__dict__"):
            continue
        seen.add(id(config))
        if hasattr(config, setting):
            found[id(config)] = config
        todo += [c for c in vars(config).values() if hasattr(c, "to_dict")]
    return list(found.values())


@contextmanager
def fast_path_off() -> Generator[None]:
    """Run nn.TransformerEncoder and nn.MultiheadAttention through their open, differentiable path."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
