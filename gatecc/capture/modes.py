"""Modes: a model in eval mode for a while."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager

from torch import nn


@contextmanager
def in_eval(model: nn.Module) -> Generator[None]:
    """The model in eval mode, and afterwards its modules in their modes of before. Its own eval() is not called: it
    may merge weights."""
    before = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in before:
            module.training = False
        yield
    finally:
        for module, training in before:
            module.training = training
