"""Reference: what a captured model computes in float64 throughout, to judge errors of float32 by.

A cast in the model's own code is a cast to float64 here, and so are its constants' dtypes: the difference from torch is
what float32 costs torch itself.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

_NARROW = (torch.float32, torch.float16, torch.bfloat16)
_CHECKS = (torch.ops.aten._assert_tensor_metadata.default,)


def reference(program: ExportedProgram, leaves: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The outputs for these inputs in float64; integers and booleans as they are."""
    module = program.module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    out = _Float64(module).run(*(_widened(x) for x in leaves))
    return tuple(x for x in pytree.tree_leaves(out) if isinstance(x, Tensor))


class _Float64(fx.Interpreter):
    """Runs a graph with every float tensor in float64."""

    def fetch_attr(self, target: str) -> Any:
        return pytree.tree_map(_widened, super().fetch_attr(target))

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target in _CHECKS:
            return None
        args, kwargs = pytree.tree_map(_widened, (args, kwargs))
        return pytree.tree_map(_widened, super().call_function(target, args, kwargs))


def _widened(x: Any) -> Any:
    if isinstance(x, torch.dtype):
        return torch.float64 if x in _NARROW else x
    return x.double() if isinstance(x, Tensor) and x.dtype in _NARROW else x
