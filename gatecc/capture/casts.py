"""Casts: modules that their own forward casts while it is captured (``self.router = self.router.to(torch.float32)``).

torch then puts other tensors in the places of parameters, which a trace does not allow. A cast that changes nothing, as
each after the first, is left out. One that changes something is refused: it stays on the model after the call, and a
graph would do it at each.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes

from gatecc.capture.origins import running_line
from gatecc.errors import CaptureError

Change = Callable[[torch.Tensor], torch.Tensor]
_VALUE = 0.7  # in no float16, float32 and float64 the same number


@contextmanager
def casts_left_out(module: nn.Module) -> Generator[None]:
    """``to``, ``float``, ``half``, ... of the module's parts do nothing where they change nothing. Raises CaptureError
    where they do."""
    real = nn.Module._apply
    parts = {id(m) for m in module.modules()}

    def apply(self: nn.Module, fn: Change, *args: Any, **kwargs: Any) -> nn.Module:
        if id(self) not in parts:
            return real(self, fn, *args, **kwargs)
        with _disable_current_modes():
            changes = list(dict.fromkeys(_changes(self, fn)))
        if changes:
            raise CaptureError(
                "the forward casts a part of the model",
                found=f"{type(self).__name__}: {', '.join(changes)} ({running_line()})",
                do="cast it before, or call the model once before: the cast stays",
            )
        return self

    nn.Module._apply = apply
    try:
        yield
    finally:
        nn.Module._apply = real


def _changes(module: nn.Module, fn: Change) -> Iterator[str]:
    """What a change makes of the weights, in words: tried on a tensor of one entry like each."""
    for x in chain(module.parameters(), module.buffers()):
        like = torch.full((1,) * x.dim(), _VALUE, device=x.device).to(x.dtype)
        made = fn(like)
        if made.dtype != x.dtype or made.device != like.device:
            yield f"{x.dtype} on {like.device} to {made.dtype} on {made.device}"
        elif not like.is_meta and not torch.equal(like, made):
            yield "other values"
