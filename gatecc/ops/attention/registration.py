"""What decoder, ONNX and cost know of ``gatecc::attention``."""

from __future__ import annotations

import torch

from gatecc.codegen.judge import family as judge
from gatecc.codegen.onnx.lowering import GRADIENT
from gatecc.ops.attention import cost, differentiable
from gatecc.ops.attention.kernels import KERNELS
from gatecc.ops.attention.onnx import LOWERING
from gatecc.ops.registry import Operator, StepRule, Unfit, register

_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.attention.default,
        step=StepRule(
            operand="q",
            axis=2,
            unfit=lambda node: Unfit(
                "a call of gatecc::attention", "write scaled_dot_product_attention: the backend puts the operator there"
            ),
        ),
        onnx={"portable": LOWERING},
        flops=cost.forward,
        served=cost.served,
        taken=cost.taken,
        masked=differentiable.forward,
        bytes=cost.moved_bytes,
        kernels=KERNELS,
    )
)
register(Operator(overload=_ops.attention_backward.default, onnx={"portable": GRADIENT}, flops=cost.backward))
judge.register("gatecc.ops.attention.triton.judged")
judge.register("gatecc.ops.attention.triton.judged_region")
