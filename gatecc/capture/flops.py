"""flops: the floating-point operations of what runs, by torch's own formulas."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

Result = TypeVar("Result")


def counted(call: Callable[[], Result]) -> tuple[Result, int]:
    """The result of a call without gradients, and the floating-point operations that ran in it."""
    with torch.no_grad(), FlopCounter() as counter, sdpa_kernel(SDPBackend.MATH):  # others have no formula on a CPU
        result = call()
    return result, counter.total


class FlopCounter(TorchDispatchMode):
    """Adds up torch's formulas. Its own counter hooks into modules, and what hooks look at runs beside a rewrite."""

    total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out
