"""The nonlinearities of gatecc.ops.moe_ffn.activations, in float32 registers. Options come as numbers A and B."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def tanh(x):
    """tanh by a sigmoid: Triton's interpreter has no other."""
    return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@triton.jit
def smooth(x, NAME: tl.constexpr):
    """Those without options that are no pieces of polynomials."""
    if NAME == "silu":
        x = x * tl.sigmoid(x)
    elif NAME == "gelu":
        x = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu(tanh)":
        x = 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))
    elif NAME == "quick_gelu":
        x = x * tl.sigmoid(1.702 * x)
    elif NAME == "tanh":
        x = tanh(x)
    elif NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "softplus":
        x = tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))
    elif NAME == "mish":  # tanh(log(1 + e^x)) = n / (n + 2)
        e = tl.exp(tl.minimum(x, 20.0))
        x = x * (e * (e + 2.0)) / (e * (e + 2.0) + 2.0)
    return x


@triton.jit
def pointwise(x, NAME: tl.constexpr, A: tl.constexpr):
    """One of the table; "identity" is none of them."""
    if NAME == "relu":
        x = tl.maximum(x, 0.0)
    elif NAME == "relu2":
        x = tl.maximum(x, 0.0) * tl.maximum(x, 0.0)
    elif NAME == "relu6":
        x = tl.minimum(tl.maximum(x, 0.0), 6.0)
    elif NAME == "hardswish":
        x = x * tl.minimum(tl.maximum(x + 3.0, 0.0), 6.0) / 6.0
    elif NAME == "leaky_relu":
        x = tl.where(x > 0, x, A * x)
    elif NAME == "elu":
        x = tl.where(x > 0, x, A * (tl.exp(tl.minimum(x, 0.0)) - 1.0))
    elif NAME == "selu":
        x = 1.0507009873554805 * tl.where(x > 0, x, 1.6732632423543772 * (tl.exp(tl.minimum(x, 0.0)) - 1.0))
    else:
        x = smooth(x, NAME)
    return x


@triton.jit
def gated(gate, up, NAME: tl.constexpr, A: tl.constexpr, B: tl.constexpr):
    """Of gate and up; "swiglu" of gpt-oss takes both, B is its limit, None for none."""
    if NAME == "swiglu":
        if B is not None:
            gate = tl.minimum(gate, B)
            up = tl.minimum(tl.maximum(up, -B), B)
        found = gate * tl.sigmoid(A * gate) * (up + 1.0)
    else:
        found = pointwise(gate, NAME, A) * up
    return found
