"""Forms that torch.export cannot trace, in others that mean the same, while a module is captured.

- ``weight.data`` makes a tensor that no tracer has seen; ``weight.detach()`` is the same tensor in the graph.
- A hook on a tensor is no part of a graph: of one that is to be trained it is refused, for it may change gradients.
- ``torch.rand(1) > 0.0`` (a dropout of whole modules that is switched off, in adapters) is a decision on data for the
  tracer; a number drawn from [0, 1) decides nothing at the ends of its range. The number is drawn all the same.
"""

from __future__ import annotations

import operator
import random
import sys
import traceback
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode, resolve_name

from gatecc.errors import CaptureError

_DATA = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_COMPARED: dict[Any, Any] = {
    **dict.fromkeys((torch.gt, torch.Tensor.gt, torch.Tensor.__gt__), operator.gt),
    **dict.fromkeys((torch.ge, torch.Tensor.ge, torch.Tensor.__ge__), operator.ge),
    **dict.fromkeys((torch.lt, torch.Tensor.lt, torch.Tensor.__lt__), operator.lt),
    **dict.fromkeys((torch.le, torch.Tensor.le, torch.Tensor.__le__), operator.le),
}


_HOOKS = (
    torch.Tensor.register_hook,
    torch.Tensor.register_post_accumulate_grad_hook,
    torch.Tensor.retain_grad,
)


class TraceableForms(TorchFunctionMode):
    """Says what the model's code says in a form that can be traced. ``trained``: the graph is to be trained."""

    def __init__(self, *, trained: bool) -> None:
        super().__init__()
        self.trained = trained
        self.drawn: dict[int, torch.Tensor] = {}  # what torch.rand gave, kept alive: recognised by identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DATA:  # each access makes a new object of it
            return args[0].detach()
        if func in _HOOKS and self.trained:
            raise CaptureError(
                "the forward puts a hook on a tensor, which a graph would skip",
                found=f"Tensor.{func.__name__}",
                do="put a backward hook on a submodule instead (register_full_backward_hook)",
            )
        if func in _COMPARED and len(args) == 2 and id(args[0]) in self.drawn and _at_an_end(args[1]):
            decided = _COMPARED[func](0.5, args[1])
            return torch.tensor(decided, device=args[0].device).expand(args[0].shape)
        out = func(*args, **kwargs)
        if func is torch.rand:
            self.drawn[id(out)] = out
        return out


def called_at_failure(error: BaseException) -> str:
    """``aten._local_scalar_dense.default`` or ``torch.Tensor.__bool__``: what torch failed at; empty if the model's own
    code did."""
    refused = getattr(error, "func", None)  # of torch's own errors about fake tensors
    if isinstance(refused, OpOverload):
        return str(refused)
    ours = TraceableForms.__torch_function__.__code__
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code is ours]
    called = frames[-1].f_locals.get("func") if frames else None
    return "" if called is None else resolve_name(called) or getattr(called, "__name__", "")


@contextmanager
def nothing_drawn_by_python(module: nn.Module) -> Generator[None]:
    """Raise CaptureError if a forward in training draws from Python's or NumPy's random numbers: a graph would hold
    what was drawn, and every call of it would be that one."""
    before = _drawn()
    yield
    if any(m.training for m in module.modules()) and _drawn() != before:
        raise CaptureError(
            "the forward draws random numbers that are none of torch's",
            where=type(module).__name__,
            found="the module random, or numpy.random",
            do="draw them with torch (torch.rand), or select sites in submodules that do not draw",
        )


def _drawn() -> tuple[Any, ...]:
    numpy = sys.modules.get("numpy")
    state = () if numpy is None else numpy.random.get_state()
    return random.getstate(), *(x.tobytes() if hasattr(x, "tobytes") else x for x in state)


def _at_an_end(bound: Any) -> bool:
    return isinstance(bound, int | float) and not 0 < bound < 1
