"""``gatecc::linear_attention_step``: one token, the state updated where it lies. For decoding; it has no gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import kernels
from gatecc.ops.linear_attention.reference import token_by_token
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, has_tangents, reaches_kernel

LIBRARY.define(
    "linear_attention_step(Tensor q, Tensor k, Tensor v, Tensor? log_decay, Tensor? beta, Tensor(a!) state, "
    "*, float? scale=None) -> Tensor"
)


def linear_attention_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    """What ``linear_attention`` gives for one more token, o: (B, H, Dv); ``state`` becomes the state after it.

    q: (B, H, Dk), k: (B, Hk, Dk), v: (B, Hv, Dv), log_decay: (B, Hg, Dk or 1), beta: (B, Hb), the numbers of heads
    dividing H. state: (B, H, Dk, Dv), contiguous, float32 (float64 with float64 inputs).

    Raises ArgumentError for shapes that do not fit, for a state that cannot be updated in place, and where a derivative
    is asked for.
    """
    # A plain call on plain tensors goes past the dispatcher, which takes longer than the step.
    if not torch.compiler.is_compiling() and reaches_kernel((q, k, v, log_decay, beta, state)):
        return _step(q, k, v, log_decay, beta, state, scale=scale)
    return torch.ops.gatecc.linear_attention_step(q, k, v, log_decay, beta, state, scale=scale)


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    factor = state.size(2) ** -0.5 if scale is None else scale
    device = kernels.KERNELS.get(state.device.type)
    o = device.step(q, k, v, log_decay, beta, state, state, factor) if device else None
    return _step_of_any(q, k, v, log_decay, beta, state, factor) if o is None else o


def _step_of_any(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor, scale: float
) -> Tensor:
    """Check the operands, bring them into the state's dtype and number of heads, and try the kernel again."""
    B, H, Dk, Dv = state.shape
    given, dtype = q.dtype, torch.promote_types(q.dtype, torch.float32)
    if state.dtype != dtype or not state.is_contiguous():
        found = f"{state.dtype}, strides {state.stride()}"
        raise ArgumentError("the state cannot be updated in place", found=found, expected=f"{dtype}, contiguous")
    q, k, v = (_fit(n, x, (B, H, D), dtype) for n, x, D in (("q", q, Dk), ("k", k, Dk), ("v", v, Dv)))
    if log_decay is not None:
        log_decay = _fit("log_decay", log_decay, (B, H, Dk if log_decay.size(-1) == Dk else 1), dtype)
    if beta is not None:
        beta = _fit("beta", beta, (B, H), dtype)
    device = kernels.KERNELS.get(state.device.type)
    o = device.step(q, k, v, log_decay, beta, state, state, scale) if device else None
    if o is None:
        decay = None if log_decay is None else log_decay.unsqueeze(2)
        strength = None if beta is None else beta[:, :, None, None]
        o, after = token_by_token(q.unsqueeze(2) * scale, k.unsqueeze(2), v.unsqueeze(2), decay, strength, state)
        state.copy_(after)
        o = o.squeeze(2)
    return o.to(given)


def _fit(name: str, x: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """x with every head of ``shape``: heads that serve a group are repeated, a constant is expanded."""
    fits = x.dim() == len(shape) and x.size(0) in (1, shape[0]) and x.shape[2:] == shape[2:] and x.size(1) > 0
    if not fits or shape[1] % x.size(1) or (name == "q" and x.size(1) != shape[1]):
        raise ArgumentError(f"{name} of a step does not fit the state", found=str(tuple(x.shape)), expected=str(shape))
    x = x.expand(shape[0], *x.shape[1:]).to(dtype)
    return (x if x.size(1) == shape[1] else x.repeat_interleave(shape[1] // x.size(1), 1)).contiguous()


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None,
    beta: Tensor | None,
    state: Tensor,
    *,
    scale: float | None = None,
) -> Tensor:
    return q.new_empty(*q.shape[:2], v.size(2))


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Tensor:
    if reaches_kernel(tensors):  # the rest of the way through the dispatcher takes longer than the step
        return _step(*tensors, **options)
    if has_tangents(tensors) or (torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)):
        _refuse(*tensors)
    with torch._C._AutoDispatchBelowAutograd():
        operator = torch.ops.gatecc.linear_attention_step.default
        return operator.redispatch(keys & torch._C._after_autograd_keyset, *tensors, **options)


def _refuse(*tensors: Tensor | None, **options: Any) -> Tensor:
    raise ArgumentError(
        "a step of linear attention updates its state in place: it has no derivative, and no transform of torch.func",
        found="tensors that require a gradient, or torch.func",
        do="call it under torch.no_grad(), or gatecc.ops.linear_attention.linear_attention with initial_state",
    )


LIBRARY.impl("linear_attention_step", _step, "CompositeExplicitAutograd")
LIBRARY.impl("linear_attention_step", _autograd, "Autograd", with_keyset=True)
LIBRARY.impl("linear_attention_step", _refuse, UNDER_FUNC)
torch.library.register_fake("gatecc::linear_attention_step", _fake, lib=LIBRARY)
