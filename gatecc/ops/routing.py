"""Operators of routers: a loss that enters in the backward pass, and figures that are kept in buffers.

Both exist as operators so that a captured, compiled, checkpointed or pipelined model keeps them: nobody has to carry
a list of losses out of the model.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from gatecc.codegen.onnx.lowering import Lowering, without_form
from gatecc.ops.registry import Operator, register
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, derivatives, has_tangents, instead, refuse

# -- add_loss ----------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gatecc::add_loss", mutates_args=())
def add_loss(x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    """x itself; differentiating what is computed from it goes on as if ``scale * loss`` had been added to the end.

    x of any shape, loss and scale: (). The gradient of x passes unchanged. As in Megatron-LM's MoEAuxLossAutoScaler.
    """
    return x.clone()


@add_loss.register_fake
def _(x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    return torch.empty_like(x)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, loss, scale = inputs
    ctx.save_for_backward(loss, scale)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    if torch.is_grad_enabled():
        _added_once()
    return _with_loss(ctx, gradient)


def _with_loss(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
    loss, scale = ctx.saved_tensors
    return gradient, scale.to(loss.dtype).expand_as(loss), None


class _AddLoss(torch.autograd.Function):
    """``add_loss`` for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
        return x.clone()

    setup_context = staticmethod(_setup)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> tuple[Tensor | None, ...]:
        return _with_loss(ctx, *grad_outputs)


def _added_once() -> NoReturn:
    # A second derivative goes through x again, and there the loss would be added again.
    refuse(
        "a loss that enters in the backward pass has one derivative, in reverse mode",
        found="a second derivative (create_graph=True), or forward mode",
        do="one derivative; model.eval(), where a router adds no loss; or a router without balance",
    )


def _under_func(x: Tensor, loss: Tensor, scale: Tensor) -> Tensor:
    if has_tangents((x, loss)) or max(derivatives(x), derivatives(loss)) > 1:
        _added_once()
    return _AddLoss.apply(x, loss, scale)


add_loss.register_autograd(_backward, setup_context=_setup)
instead(add_loss, _under_func)
register(
    Operator(overload=torch.ops.gatecc.add_loss.default, onnx={"portable": Lowering(lambda x, loss, scale: x.clone())})
)


# -- record ------------------------------------------------------------------------------------------------------------


@torch.library.custom_op("gatecc::record", mutates_args=("state",))
def record(state: Tensor, values: Tensor, step: Tensor) -> None:
    """Add ``values`` (n,) to ``state`` (1 + n,), which starts anew whenever the step that it holds is not ``step``.

    state[0] is the step of what state holds. So the figures of a step stay readable until the first forward pass of
    the next one, and all forward passes of an accumulation are summed. A forward pass that a checkpoint runs again is
    counted again: shares and means are as they were.
    """
    fresh = state[:1] != step
    state[1:].copy_(torch.where(fresh, 0, state[1:]) + values)
    state[:1].copy_(step)


@record.register_fake
def _(state: Tensor, values: Tensor, step: Tensor) -> None:
    return None


def _kept_out(*_: Any) -> None:
    """torch.func has no place for a figure of one sample among many."""


LIBRARY.impl("gatecc::record", _kept_out, UNDER_FUNC)
_KEPT = without_form("figures that are kept in a buffer", "export the model in eval mode, where a router keeps none")
register(Operator(overload=torch.ops.gatecc.record.default, onnx={"portable": _KEPT}))
