"""``gatecc::spike``: 1 where a membrane has reached its threshold, with the gradient of an arctangent."""

from __future__ import annotations

from math import pi
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.registry import Operator, StepRule, register
from gatecc.ops.transforms import instead


@torch.library.custom_op("gatecc::spike", mutates_args=())
def spike(v: Tensor, alpha: float) -> Tensor:
    """1[v >= 0], of v's shape and dtype; its gradient is that of arctan(pi/2 alpha v) / pi + 1/2 (Fang et al., 2021).

    v: the membrane less its threshold, of any shape. alpha: how steep the surrogate is; 2 in snntorch and spikingjelly.
    """
    return _reached(v)


@spike.register_fake
def _(v: Tensor, alpha: float) -> Tensor:
    return torch.empty_like(v)


def _reached(v: Tensor) -> Tensor:
    return (v >= 0).to(v.dtype)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    v, ctx.alpha = inputs
    ctx.save_for_backward(v)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    (v,) = ctx.saved_tensors
    return gradient * (ctx.alpha / 2) / (1 + (pi / 2 * ctx.alpha * v).square()), None


def _spelled(v: Tensor, alpha: float) -> Tensor:
    """The same in ATen. For v >= 0 the surrogate is at least 1/2, so that 1 less it, and it again, are exact."""
    smooth = torch.atan(pi / 2 * alpha * v) / pi + 0.5
    return smooth + (_reached(v) - smooth).detach()


spike.register_autograd(_backward, setup_context=_setup)
instead(spike, _spelled)
register(
    Operator(
        overload=torch.ops.gatecc.spike.default,
        step=StepRule(operand="v", axis=None),
        onnx={"portable": Lowering(lambda v, alpha: _reached(v))},
        flops=lambda v, alpha: 0,  # a comparison, as torch's counter counts activations
    )
)
