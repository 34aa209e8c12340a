"""What decoder, ONNX and cost know of linear attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.codegen.judge import family as judge
from gatecc.codegen.onnx.lowering import GRADIENT, without_form
from gatecc.ir.ops import named
from gatecc.ops.linear_attention import cost, gates
from gatecc.ops.linear_attention.kernels import KERNELS
from gatecc.ops.linear_attention.onnx import FORMS
from gatecc.ops.linear_attention.step import linear_attention_step
from gatecc.ops.registry import Carry, Operator, StepRule, Unfit, register


def _unfit(node: fx.Node) -> Unfit | None:
    for name, plain in (("reverse", False), ("cu_seqlens", None)):
        if named(node, name) is not plain:
            return Unfit(f"linear attention with {name}", "a decoder runs forwards over one text per sample")
    return None


def _one_token(node: fx.Node) -> Callable[..., Any] | None:
    """The step kernel knows no padding and no normaliser."""
    return bound() if named(node, "mask") is None and not named(node, "normalize") else None


def bound() -> Callable[..., tuple[Tensor, Tensor]]:
    """``linear_attention`` of one token for one place in a program: what it finds out of a call holds for the next."""
    steps = {name: step for name, kernels in KERNELS.items() if (step := kernels.one_token()) is not None}
    on_cpu = steps.get("cpu")  # the name of a device takes longer to ask for

    def one_token(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        log_decay: Tensor | None,
        beta: Tensor | None,
        initial_state: Tensor,
        *_: Any,
        scale: float | None = None,
        gate_normalizer: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, Tensor]:
        """From a state, which stays as it is. q: (B, H, 1, Dk) -> o: (B, H, 1, Dv), the state after the token."""
        strength = beta.squeeze(3) if beta is not None and beta.dim() == 4 else beta
        step = on_cpu if q.is_cpu else steps.get(q.device.type)
        if step is not None:
            found = step(q, k, v, log_decay, strength, initial_state, scale, gate_normalizer)
            if found is not None:
                return found
        state = initial_state.clone()
        log_decay = None if log_decay is None else gates.log_decay(log_decay, gate_normalizer)
        decay, strength = (None if x is None else x.select(2, 0) for x in (log_decay, beta))
        o = linear_attention_step(q.select(2, 0), k.select(2, 0), v.select(2, 0), decay, strength, state, scale=scale)
        return o.unsqueeze(2), state

    return one_token


_ops = torch.ops.gatecc
register(
    Operator(
        overload=_ops.linear_attention.default,
        step=StepRule(
            operand="q", axis=2, carries=(Carry("initial_state", output=1),), unfit=_unfit, one_token=_one_token
        ),
        onnx=FORMS,
        flops=cost.forward,
        kernels=KERNELS,
    )
)
_IN_PLACE = without_form(
    "a state that is written to", "call gatecc.ops.linear_attention.linear_attention, which returns the next state"
)
register(Operator(overload=_ops.linear_attention_backward.default, onnx={"portable": GRADIENT}, flops=cost.backward))
register(Operator(overload=_ops.linear_attention_step.default, onnx={"portable": _IN_PLACE}, flops=cost.step))
judge.register("gatecc.ops.linear_attention.triton.judged")
judge.register("gatecc.ops.linear_attention.triton.judged_step")
