"""``gatecc::moe_ffn``: schema, fake kernel, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.moe_ffn import differentiable, kernels
from gatecc.ops.moe_ffn.arguments import DIFFERENTIABLE, read
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, autocast, below_autograd, learn

_TENSORS = (
    "Tensor x, Tensor weights, Tensor indices, Tensor gate_up, Tensor down, Tensor? gate_up_bias=None, "
    "Tensor? down_bias=None"
)
_OPTIONS = 'str activation="silu", str layout="halves", str combine="sum"'
LIBRARY.define(f"moe_ffn({_TENSORS}, *, {_OPTIONS}) -> Tensor")
LIBRARY.define(f"moe_ffn_training({_TENSORS}, *, {_OPTIONS}) -> (Tensor, Tensor)")
LIBRARY.define(
    f"moe_ffn_backward(Tensor grad, Tensor hidden, {_TENSORS}, *, bool[] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*tensors: Tensor | None, **options: Any) -> Tensor:
    return kernels.forward(read(tensors, options), keep=False)[0]


def _fake(*tensors: Tensor | None, **options: Any) -> Tensor:
    a = read(tensors, options)
    return a.x.new_empty(a.output_shape)


def _training(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    """The result, and what the gradient wants of it."""
    out, hidden = kernels.forward(read(tensors, options), keep=True)
    assert hidden is not None
    return out, hidden


def _fake_training(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    a = read(tensors, options)
    return a.x.new_empty(a.output_shape), a.x.new_empty(a.hidden_shape)


def _backward(
    grad: Tensor, hidden: Tensor, *tensors: Tensor | None, needs: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    """Gradients of all tensors but the indices; an empty tensor for one that is not needed."""
    found = kernels.backward(read(tensors, options), grad, hidden, needs)
    return tuple(grad.new_empty(0) if g is None else g for g in found)


def _fake_backward(
    grad: Tensor, hidden: Tensor, *tensors: Tensor | None, needs: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    given = [differentiable.padded(tensors)[i] for i in DIFFERENTIABLE]
    return tuple(
        x.new_empty(x.shape) if need and x is not None else grad.new_empty(0)
        for x, need in zip(given, needs, strict=True)
    )


class _Differentiable(torch.autograd.Function):
    """The operator on tensors of which some need a gradient."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> Tensor:
        out, hidden = below_autograd(_TRAINING, keys, options, *tensors)
        ctx.save_for_backward(hidden, *tensors)
        ctx.options = options
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden, *tensors = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        needs = [i < len(tensors) and tensors[i] is not None and wanted[i] for i in DIFFERENTIABLE]
        found = dict(zip(DIFFERENTIABLE, _GRADIENT(*grads, hidden, *tensors, needs=needs, **ctx.options), strict=True))
        given = dict(zip(DIFFERENTIABLE, needs, strict=True))
        return (None, None, *(found[i] if given.get(i) else None for i in range(len(tensors))))


class _Gradient(torch.autograd.Function):
    """Its gradient where that is differentiated in turn (``create_graph=True``)."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(tensors[0], *tensors[2:])
        ctx.options = options
        return below_autograd(_GRADIENT, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        grad, *tensors = ctx.saved_tensors
        options = dict(ctx.options)
        of_grad, *rest = differentiable.second(cotangents, grad, tuple(tensors), options.pop("needs"), options)
        return (None, None, of_grad, None, *rest)


def _of_autocast(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under autocast x and the experts are cast as those of a linear layer are; weights are not."""
    x = tensors[0]
    assert x is not None
    dtype = torch.get_autocast_dtype(x.device.type)
    return tuple(
        t if t is None or i in (1, 2) or t.dtype == torch.float64 else t.to(dtype) for i, t in enumerate(tensors)
    )


LIBRARY.impl("moe_ffn", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_training", _training, "CompositeExplicitAutograd")
LIBRARY.impl("moe_ffn_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::moe_ffn", _fake, lib=LIBRARY)
torch.library.register_fake("gatecc::moe_ffn_training", _fake_training, lib=LIBRARY)
torch.library.register_fake("gatecc::moe_ffn_backward", _fake_backward, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.moe_ffn.default
_TRAINING = torch.ops.gatecc.moe_ffn_training.default
_GRADIENT = torch.ops.gatecc.moe_ffn_backward.default
learn(_OPERATOR, _Differentiable, differentiable.forward)
learn(_GRADIENT, _Gradient, differentiable.gradients)
autocast(_OPERATOR, _of_autocast, differentiable.forward)
LIBRARY.impl("moe_ffn_backward", differentiable.gradients, UNDER_FUNC)


def moe_ffn(
    x: Tensor,
    weights: Tensor,
    indices: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    *,
    activation: str = "silu",
    layout: str = "halves",
    combine: str = "sum",
) -> Tensor:
    """k of E feed-forward networks per token: the sum over slots j of w_tj f_(i_tj)(x_t), (T, o), in x's dtype.

        f_e(x) = down_e (act(gate_e x) * (up_e x)), without a gate down_e act(up_e x); with biases where they are given.

    Args:
        x: (T, d), in float32, bfloat16, float16 or float64.
        weights: (T, k), of any floating-point dtype. The weight of an empty slot is not read.
        indices: (T, k), int64: the expert of each slot, or E for a slot that is empty. Empty slots add nothing and cost
            nothing. An expert may come several times in a row.
        gate_up: (E, 2F, d), or (E, F, d) in the plain layout; of x's dtype, like the next three, and of any strides.
        down: (E, o, F).
        gate_up_bias: (E, 2F), or (E, F) in the plain layout.
        down_bias: (E, o).
        activation: its text, one of gatecc.ops.moe_ffn.activations.names(): "silu", "gelu(tanh)", "identity", ...,
            "swiglu(alpha=1.702, limit=7.0)" of gpt-oss.
        layout: of the rows of gate_up: "halves", all of the gate, then all of up (transformers); "interleaved", in turn
            (gpt-oss); "plain", no gate.
        combine: "sum", or "slots" for the weighted results themselves, (T, k, o).

    Slots are weighted and summed in float32 (float64 for float64), in their order: the same call gives the same bits.
    Differentiable in all but the indices, to any order, in both modes, and under torch.func; kernels serve the first
    derivative, the others compute every expert on every token. Raises ArgumentError for shapes, dtypes or options that
    do not fit, and for an index out of range where indices are read on the host (neither while a graph is traced, nor
    by a GPU kernel).

    Sparsely gated experts: Shazeer et al. 2017; without capacity, as Gale et al. 2022.
    """
    return torch.ops.gatecc.moe_ffn(
        x,
        weights,
        indices,
        gate_up,
        down,
        gate_up_bias,
        down_bias,
        activation=activation,
        layout=layout,
        combine=combine,
    )
