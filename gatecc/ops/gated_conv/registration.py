"""What ONNX and cost know of ``gatecc::gated_conv``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.gated_conv import kernels
from gatecc.ops.gated_conv import operator as operator  # defines the operator
from gatecc.ops.gated_conv.arguments import masked, read
from gatecc.ops.paths import Taken
from gatecc.ops.registry import Operator, register


def _flops(x: Any, weight: Any, gate: Any, bias: Any = None, inputs: Any = None, **options: Any) -> int:
    """Two operations per multiplication of a pair of channels; from shapes alone every channel counts as on."""
    slots = options.pop("slots", None)
    made = [torch.empty(shape, device="meta") for shape in (x, weight, gate)]
    a = read(made[0], made[1], made[2], None, None, options)
    return 2 * a.places * (a.x.size(0) * a.pairs if slots is None else slots)


def _served(
    x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor | None = None, inputs: Tensor | None = None, **options: Any
) -> tuple[tuple[Tensor, ...], int, int]:
    """The kernel, the pairs of channels that are multiplied, and how many there are."""
    a = read(x, weight, gate, bias, inputs, options)
    some, every = kernels.served(a) if _is_known(gate) else (x.size(0) * a.pairs,) * 2
    return (weight,), some, every


def _taken(x: Tensor, weight: Tensor, gate: Tensor, *_: Tensor | None, out: Tensor, **__: Any) -> Taken | None:
    """For how many samples each output channel is on."""
    if not _is_known(gate):
        return None
    on = (gate.flatten(1) != 0).expand(x.size(0), -1)
    return Taken("channel", on.sum(0).tolist(), x.size(0), (weight,))


def _is_known(gate: Tensor) -> bool:
    return gate.device.type != "meta" and not isinstance(gate, FakeTensor)


register(
    Operator(
        overload=torch.ops.gatecc.gated_conv.default,
        onnx={"portable": Lowering(masked)},
        flops=_flops,
        served=_served,
        taken=_taken,
        masked=masked,
        kernels=kernels.KERNELS,
    )
)
