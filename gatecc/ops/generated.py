"""Operators that are made for a part of a graph: its kernel for GPUs, and ATen for CPUs (gatecc.codegen.regions)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch._ops import OpOverload

from gatecc.codegen.regions.blocks import WIDEST_MIDDLE
from gatecc.codegen.regions.expressions import NAMES
from gatecc.codegen.regions.region import CASTS, WIDEST_PRODUCT

POINTWISE = NAMES
"""The names of the pointwise operators that such a part may have."""
REDUCED = ("sum", "mean", "amax", "amin", "var")
"""Those of reductions of rows, which keep their axis."""
ROWWISE = ("layer_norm", "rms_norm", "softmax", "log_softmax")
"""Those of operators that are made of both."""


def generated(function: Callable[..., Any], example: Sequence[Tensor], notes: Sequence[str]) -> OpOverload | str:
    """The operator that computes what a function of tensors does, or why there is none: it cannot be printed, or two
    kernels take less for so many rows as the example has, by a static model.

    ``example``: tensors of these sizes and dtypes, fake ones will do; ``notes`` stand in its file.
    """
    from gatecc.codegen.regions.build import build
    from gatecc.codegen.regions.region import RefusedError

    try:
        module = build(function, example, notes, slower=False).module
    except RefusedError as reason:
        return str(reason)
    except ImportError as error:
        return f"Triton cannot be imported ({error})"
    return module.operator._opoverload


__all__ = ["CASTS", "POINTWISE", "REDUCED", "ROWWISE", "WIDEST_MIDDLE", "WIDEST_PRODUCT", "generated"]
