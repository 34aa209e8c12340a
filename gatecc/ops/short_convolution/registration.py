"""What decoder, ONNX and cost know of short convolutions."""

from __future__ import annotations

from typing import Any

import torch

from gatecc.codegen.judge import family as judge
from gatecc.codegen.onnx.lowering import GRADIENT
from gatecc.ops.registry import Carry, Operator, StepRule, register
from gatecc.ops.short_convolution.kernels import KERNELS
from gatecc.ops.short_convolution.onnx import FORMS


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0] * weight[2]


def _backward_flops(grad: Any, grad_after: Any, x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """The sums are computed again, weighed once more for x, and their inputs for the weights."""
    return 3 * _flops(x, weight)


_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.short_convolution.default,
        step=StepRule(operand="x", axis=1, carries=(Carry("state", output=1),)),
        onnx=FORMS,
        flops=_flops,
        kernels=KERNELS,
    )
)
register(Operator(overload=_ops.short_convolution_backward.default, onnx={"portable": GRADIENT}, flops=_backward_flops))
judge.register("gatecc.ops.short_convolution.triton.judged")
