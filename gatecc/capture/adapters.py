"""Adapters: the documented changes that gatecc makes to a library's behaviour while it captures, all undone afterwards.

- transformers: ``config.use_cache`` is False, so that no Cache object enters a graph (a captured cache loses its
update).
- torch: the fused fast path of nn.TransformerEncoder and nn.MultiheadAttention is off: it hides attention in one
operator.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn


@contextmanager
def adapted(module: nn.Module) -> Generator[None]:
    """Apply every adapter to a module for the time of a capture or of a recording run."""
    with ExitStack() as stack:
        stack.enter_context(caches_off(module))
        stack.enter_context(fast_path_off())
        yield


@contextmanager
def caches_off(module: nn.Module) -> Generator[None]:
    """Set ``use_cache`` to False on every configuration object in the module."""
    changed = switch_caches(module)
    try:
        yield
    finally:
        for config in changed:
            config.use_cache = True


def switch_caches(module: nn.Module) -> list[Any]:
    """Switch ``use_cache`` off for good; returns the configurations that had it on."""
    changed = [config for config in _configs(module) if getattr(config, "use_cache", False)]
    for config in changed:
        config.use_cache = False
    return changed


def _configs(module: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for m in module.modules():
        config = m.__dict__.get("config")
        for c in (config, *(vars(config).values() if hasattr(config, "__dict__") else ())):
            if c is not None and hasattr(c, "use_cache") and hasattr(c, "__dict__"):
                found[id(c)] = c
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
