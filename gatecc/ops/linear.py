"""``gatecc::linear``: a dense product with an activation behind it, by oneDNN, the library that torch keeps for it.

torch's own product of float32 matrices on a CPU is that of MKL. oneDNN's is faster on some kinds of CPU (PRODUCTS, by
``python benchmarks/products.py``), and computes the activation before the result leaves the caches. Inductor calls it
for frozen weights alone; this operator takes weights as they are, at every call.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.ops.registry import Operator, register
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, below_autograd, has_tangents

ACTIVATIONS = {  # name -> what oneDNN calls it
    "identity": ("none", ""),
    "silu": ("swish", ""),
    "gelu": ("gelu", "none"),
    "gelu_tanh": ("gelu", "tanh"),
}
# Vendor, vectors -> multiply-adds of a float32 product from which on oneDNN's is the faster one: measured on Zen 4, for
# AVX2 with both libraries held to it. Below, a call costs more than it saves.
PRODUCTS = {("AuthenticAMD", "AVX512"): 1 << 25, ("AuthenticAMD", "AVX2"): 1 << 29}
ROWS = 32  # of them at least: MKL has kernels of its own for vectors

LIBRARY.define('linear(Tensor x, Tensor weight, Tensor? bias=None, str activation="identity") -> Tensor')


def smallest() -> int | None:
    """The multiply-adds from which on oneDNN's product is faster than torch's on this CPU; None: nothing is known."""
    return PRODUCTS.get((_vendor(), torch.backends.cpu.get_cpu_capability())) if _available() else None


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    if x.device.type != "cpu" or x.dtype != torch.float32 or not x.numel() or not weight.numel() or not _available():
        return _in_aten(x, weight, bias, activation)
    name, algorithm = ACTIVATIONS[activation]
    return torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, name, [], algorithm)


def _in_aten(x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str = "identity") -> Tensor:
    """The same by operators of torch, which have derivatives."""
    y = F.linear(x, weight, bias)
    if activation.startswith("gelu"):
        return F.gelu(y, approximate="tanh" if activation == "gelu_tanh" else "none")
    return F.silu(y) if activation == "silu" else y


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Tensor:
    given = [x for x in tensors if isinstance(x, Tensor)]
    if has_tangents(given) or (torch.is_grad_enabled() and any(x.requires_grad for x in given)):
        return _in_aten(*tensors, **options)
    result: Tensor = below_autograd(_OPERATOR, keys, options, *tensors)
    return result


def _flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    rows = 1
    for size in x[:-1]:
        rows *= size
    return 2 * rows * weight[0] * weight[1]


def _available() -> bool:
    return torch.backends.mkldnn.is_available() and bool(torch.backends.mkldnn.enabled)


@cache
def _vendor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), "")


LIBRARY.impl("linear", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::linear", _in_aten, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.linear.default
LIBRARY.impl("linear", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("linear", _in_aten, UNDER_FUNC)
register(Operator(overload=_OPERATOR, onnx={"portable": Lowering(_in_aten)}, flops=_flops))

__all__ = ["ACTIVATIONS", "ROWS", "smallest"]
