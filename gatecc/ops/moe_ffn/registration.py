"""What decoder, ONNX and cost know of ``gatecc::moe_ffn``."""

from __future__ import annotations

import torch

from gatecc.codegen.judge import family as judge
from gatecc.codegen.onnx.lowering import GRADIENT
from gatecc.ops.moe_ffn import cost, differentiable
from gatecc.ops.moe_ffn.kernels import KERNELS
from gatecc.ops.moe_ffn.onnx import LOWERING
from gatecc.ops.registry import Operator, StepRule, register

_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.moe_ffn.default,
        step=StepRule(operand="x", axis=None),  # each token by itself
        onnx={"portable": LOWERING},
        flops=cost.forward,
        served=cost.served,
        taken=cost.taken,
        masked=differentiable.forward,
        bytes=cost.moved_bytes,
        kernels=KERNELS,
    )
)
register(
    Operator(
        overload=_ops.moe_ffn_training.default,
        onnx={"portable": GRADIENT},
        flops=cost.forward,
        served=cost.served,
    )
)
register(
    Operator(
        overload=_ops.moe_ffn_backward.default,
        onnx={"portable": GRADIENT},
        flops=cost.backward,
        served=cost.served_backward,
    )
)
judge.register("gatecc.ops.moe_ffn.triton.judged")
