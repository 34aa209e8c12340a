"""``gatecc::only_if``: a value that a graph need not compute where a condition does not hold.

torch computes it all the same; what exports a graph may put the way to it into a branch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gatecc.codegen.onnx.branches import branch
from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.registry import Operator, register


@torch.library.custom_op("gatecc::only_if", mutates_args=())
def only_if(x: Tensor, otherwise: Tensor, condition: Tensor, label: str) -> Tensor:
    """x if the condition, one boolean (), holds, else ``otherwise``, of the same shape. Values of one label and
    condition are computed together."""
    return torch.where(condition, x, otherwise)


@only_if.register_fake
def _(x: Tensor, otherwise: Tensor, condition: Tensor, label: str) -> Tensor:
    return torch.empty_like(x)


register(Operator(overload=torch.ops.gatecc.only_if.default, onnx={"portable": Lowering(branch)}))
