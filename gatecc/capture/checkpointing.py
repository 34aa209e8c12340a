"""Gradient checkpointing inside a module that becomes one graph: refused, for it would silently be lost.

The graph of a whole model keeps every activation between the regions that were to be recomputed, and a Python call that
is edited on its way would be recomputed without the edits.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils import checkpoint

from gatecc.errors import CallNotCapturedError

# What torch.utils.checkpoint.checkpoint calls, by name; the second in torch 2.13.
_REGIONS = ("_checkpoint_without_reentrant_generator_impl", "_checkpoint_without_reentrant_generator")


@contextmanager
def no_checkpointing(where: str) -> Generator[None]:
    """Raise CallNotCapturedError where code that runs meanwhile checkpoints a part of itself for a backward pass."""

    def refuse() -> None:
        if torch.is_grad_enabled():
            raise CallNotCapturedError(
                "gradient checkpointing inside a scope: the graph of the scope would keep every activation",
                where=where,
                found="torch.utils.checkpoint is called by a module inside the scope",
                expected="checkpointing of the scope itself, or of modules around it",
                do='transform without scope="model", so that scopes lie inside of what is checkpointed; or switch it '
                "off (model.gradient_checkpointing_disable())",
            )

    def refusing(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            refuse()
            return function(*args, **kwargs)

        return called

    with ExitStack() as stack:
        for name in _REGIONS:
            if (function := vars(checkpoint).get(name)) is not None:
                stack.callback(setattr, checkpoint, name, function)
                setattr(checkpoint, name, refusing(function))
        stack.enter_context(_reentrant(refuse))
        yield


@contextmanager
def _reentrant(refuse: Callable[[], None]) -> Generator[None]:
    before = checkpoint.CheckpointFunction

    class Refusing:
        @staticmethod
        def apply(*args: Any) -> Any:
            refuse()
            return before.apply(*args)

    checkpoint.CheckpointFunction = Refusing
    try:
        yield
    finally:
        checkpoint.CheckpointFunction = before
