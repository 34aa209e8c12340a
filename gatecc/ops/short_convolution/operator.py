"""``gatecc::short_convolution``: schema, fake kernel, autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.ops.short_convolution import kernels, reference
from gatecc.ops.short_convolution.arguments import padded, read
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, below_autograd, fake_gradients, learn

_TENSORS = "Tensor x, Tensor weight, Tensor? bias=None, Tensor? state=None"
_OPTIONS = 'str activation="identity"'
LIBRARY.define(f"short_convolution({_TENSORS}, *, {_OPTIONS}) -> (Tensor y, Tensor after)")
LIBRARY.define(
    f"short_convolution_backward(Tensor grad, Tensor? grad_after, {_TENSORS}, *, bool[] needs, {_OPTIONS}) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return kernels.forward(read(tensors, options))


def _fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    a = read(tensors, options)
    return a.x.new_empty(a.x.shape), a.x.new_empty(a.state_shape)


def _backward(
    grad: Tensor, grad_after: Tensor | None, *tensors: Tensor | None, needs: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    """Gradients of the four tensors, contiguous; an empty tensor for one that is not needed."""
    found = kernels.backward(read(tensors, options), grad, grad_after, needs)
    return tuple(grad.new_empty(0) if g is None else g for g in found)


def _fake_backward(
    grad: Tensor, grad_after: Tensor | None, *tensors: Tensor | None, needs: list[bool], **options: Any
) -> tuple[Tensor, ...]:
    return fake_gradients(grad, padded(tensors), needs)


class _Differentiable(torch.autograd.Function):
    """The operator on tensors of which some need a gradient."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return below_autograd(_OPERATOR, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        grad, grad_after = grads
        if grad is None:
            if grad_after is None:
                return (None, None, *[None] * len(tensors))
            grad = torch.zeros_like(tensors[0])
        wanted = ctx.needs_input_grad[2:]
        needs = [x is not None and i < len(wanted) and wanted[i] for i, x in enumerate(padded(tensors))]
        found = _GRADIENT(grad, grad_after, *tensors, needs=needs, **ctx.options)
        return (None, None, *(found[i] if needs[i] else None for i in range(len(tensors))))


class _Gradient(torch.autograd.Function):
    """Its gradient where that is differentiated in turn (``create_graph=True``)."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return below_autograd(_GRADIENT, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        grad, grad_after, *tensors = ctx.saved_tensors
        options = dict(ctx.options)
        needs = options.pop("needs")
        return (None, None, *reference.second(cotangents, (grad, grad_after), tuple(tensors), needs, options))


LIBRARY.impl("short_convolution", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("short_convolution_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::short_convolution", _fake, lib=LIBRARY)
torch.library.register_fake("gatecc::short_convolution_backward", _fake_backward, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.short_convolution.default
_GRADIENT = torch.ops.gatecc.short_convolution_backward.default
learn(_OPERATOR, _Differentiable, reference.forward)
learn(_GRADIENT, _Gradient, reference.gradients)
LIBRARY.impl("short_convolution", reference.forward, UNDER_FUNC)
LIBRARY.impl("short_convolution_backward", reference.gradients, UNDER_FUNC)


def short_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    *,
    activation: str = "identity",
) -> tuple[Tensor, Tensor]:
    """A causal convolution of few taps along tokens, each channel by itself: y (B, N, C) and the state behind it.

        y_t = act(bias + the sum over j of weight_j x_(t - K + 1 + j)).

    Args:
        x: (B, N, C), tokens first, as projections leave it and what follows reads it.
        weight: (C, 1, K), as conv1d holds it. Kernels are written for K from 2 to 8.
        bias: (C,).
        state: (B, K - 1, C), the inputs before the first; zeros if not given. The second result is that of the next
            call, so that texts may come in pieces of any length.
        activation: "identity" or "silu".

    Both results are contiguous. Differentiable in all four, to any order, in both modes, and under torch.func; kernels
    serve the first derivative. Raises ArgumentError for shapes, dtypes or options that do not fit.

    On a CPU torch transposes to channels first, where Inductor computes a tap at a time through gathered weights. Of
    Mamba (Gu and Dao 2023), gated delta nets, LFM2 and the like.
    """
    return torch.ops.gatecc.short_convolution(x, weight, bias, state, activation=activation)
