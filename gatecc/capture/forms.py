"""Forms that torch.export cannot trace, in others that mean the same, while a module is captured.

- ``weight.data`` makes a tensor that no tracer has seen; ``weight.detach()`` is the same tensor in the graph.
- ``torch.rand(1) > 0.0`` (a dropout of whole modules that is switched off, in adapters) is a decision on data for the
  tracer; a number drawn from [0, 1) decides nothing at the ends of its range. The number is drawn all the same.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_DATA = torch.Tensor.data.__get__  # pyright: ignore[reportAttributeAccessIssue]
_COMPARED: dict[Any, Any] = {
    **dict.fromkeys((torch.gt, torch.Tensor.gt, torch.Tensor.__gt__), operator.gt),
    **dict.fromkeys((torch.ge, torch.Tensor.ge, torch.Tensor.__ge__), operator.ge),
    **dict.fromkeys((torch.lt, torch.Tensor.lt, torch.Tensor.__lt__), operator.lt),
    **dict.fromkeys((torch.le, torch.Tensor.le, torch.Tensor.__le__), operator.le),
}


class TraceableForms(TorchFunctionMode):
    """Says what the model's code says in a form that can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.drawn: dict[int, torch.Tensor] = {}  # what torch.rand gave, kept alive: recognised by identity

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func == _DATA:  # each access makes a new object of it
            return args[0].detach()
        if func in _COMPARED and len(args) == 2 and id(args[0]) in self.drawn and _at_an_end(args[1]):
            decided = _COMPARED[func](0.5, args[1])
            return torch.tensor(decided, device=args[0].device).expand(args[0].shape)
        out = func(*args, **kwargs)
        if func is torch.rand:
            self.drawn[id(out)] = out
        return out


def _at_an_end(bound: Any) -> bool:
    return isinstance(bound, int | float) and not 0 < bound < 1
