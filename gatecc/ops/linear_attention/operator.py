"""``gatecc::linear_attention``: schema, fake kernel, autograd."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gatecc.ops.linear_attention import differentiable, kernels
from gatecc.ops.linear_attention.arguments import read
from gatecc.ops.linear_attention.layout import laid, room
from gatecc.ops.linear_attention.problem import finish, finish_backward, prepare, prepare_backward
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, autocast, below_autograd, learn

_INPUTS = (
    "Tensor q, Tensor k, Tensor v, Tensor? log_decay=None, Tensor? beta=None, Tensor? initial_state=None, "
    "Tensor? cu_seqlens=None, Tensor? mask=None, *, float? scale=None, bool reverse=False, bool normalize=False, "
    "float? gate_normalizer=None"
)
LIBRARY.define(f"linear_attention({_INPUTS}) -> (Tensor o, Tensor final_state)")
LIBRARY.define(
    f"linear_attention_backward(Tensor grad_o, Tensor grad_state, {_INPUTS}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    a = read(tensors, options)
    o, state = kernels.forward(prepare(a))
    return laid(finish(a, o), a.q), state


def _fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    a = read(tensors, options)
    return room(a.q, a.v.size(3)), a.q.new_empty(a.state_shape, dtype=a.state_dtype)


def _backward(grad_o: Tensor, grad_state: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    """Gradients of the first six inputs, each lying as its input does; an empty tensor for one that was not given."""
    a = read(tensors, options)
    problem = prepare(a)
    o = kernels.forward(problem)[0].to(a.state_dtype) if a.normalize else None
    grads = prepare_backward(a, kernels.backward(problem, finish_backward(a, o, grad_o), grad_state))
    # Shaped as they came: beta may have done without its last axis.
    return tuple(
        a.q.new_empty(0) if g is None or x is None else laid(g, x) if x.dim() == 4 else g.contiguous().view(x.shape)
        for g, x in zip(grads, tensors, strict=False)
    ) + tuple(a.q.new_empty(0) for _ in grads[len(tensors) :])


def _fake_backward(grad_o: Tensor, grad_state: Tensor, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, ...]:
    six = (*tensors, *[None] * (6 - len(tensors)))[:6]
    return tuple(grad_o.new_empty(0) if x is None else _new_gradient(x) for x in six)


def _new_gradient(x: Tensor) -> Tensor:
    return room(x, x.size(3)) if x.dim() == 4 else x.new_empty(x.shape)


class _Differentiable(torch.autograd.Function):
    """The operator on tensors of which some need a gradient."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return below_autograd(_OPERATOR, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        found = _GRADIENT(*grads, *tensors, **ctx.options)
        given = [None if x is None else g for x, g in zip(tensors[:6], found, strict=False)]
        return (None, None, *given, *[None] * len(tensors[6:]))


class _Gradient(torch.autograd.Function):
    """Its gradient where that is differentiated in turn (``create_graph=True``)."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors)
        ctx.options = options
        return below_autograd(_GRADIENT, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        grad_o, grad_state, *tensors = ctx.saved_tensors
        found = differentiable.second(cotangents, grad_o, grad_state, tuple(tensors), ctx.options)
        return (None, None, *found)


def _of_one_dtype(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under autocast q, k and v meet in the widest of their dtypes, as the operands of torch.cat do.

    Projections come in a narrow one, features and gates, which are computed from them in float32, do not.
    """
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors[:3] if x is not None))
    return (*(None if x is None else x.to(widest) for x in tensors[:3]), *tensors[3:])


LIBRARY.impl("linear_attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("linear_attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::linear_attention", _fake, lib=LIBRARY)
torch.library.register_fake("gatecc::linear_attention_backward", _fake_backward, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.linear_attention.default
_GRADIENT = torch.ops.gatecc.linear_attention_backward.default
learn(_OPERATOR, _Differentiable, differentiable.forward)
learn(_GRADIENT, _Gradient, differentiable.gradients)
autocast(_OPERATOR, _of_one_dtype, differentiable.forward)
LIBRARY.impl("linear_attention_backward", differentiable.gradients, UNDER_FUNC)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    reverse: bool = False,
    normalize: bool = False,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    gate_normalizer: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention by a recurrence with a state of constant size: o: (B, H, N, Dv) and the final state, (B, H, Dk, Dv).

    Args:
        q: (B, H, N, Dk).
        k: (B, Hk, N, Dk). As for v, log_decay and beta the number of heads divides H (grouped queries).
        v: (B, Hv, N, Dv), like q and k in float32, bfloat16, float16 or float64.
        log_decay: (B, Hg, N, Dk) a key channel, (B, Hg, N, 1) a head, or (1, H, 1, 1) constant; -inf forgets all.
        beta: (B, Hb, N) or (B, Hb, N, 1), the write strength of the delta rules.
        initial_state: (B, H, Dk, Dv); zero if not given. It is not changed.
        scale: multiplies q; Dk ** -0.5 if not given.
        reverse: the recurrence runs from the last token to the first.
        normalize: divide o by q · z, where z sums the keys as the state sums k v^T. A ones column is appended to v, so
            the states have Dv + 1 columns and the last one is z. Where q · z is 0, o is 0. Not with beta.
        cu_seqlens: (S + 1,) where packed sequences begin, ascending from 0 to N; B = 1, states (S, H, Dk, Dv).
        mask: (B, N), False at padding: such a token writes nothing, decays nothing, and its output is zero.
        gate_normalizer: log_decay holds logits x instead, and the log decay is logsigmoid(x) / gate_normalizer (GLA has
            16); so is its gradient that of x. Kernels activate them where they read them.

    The rule follows from what is given: linear (Katharopoulos et al. 2020), gated with log_decay (Yang et al. 2024,
    GLA), delta with beta (Schlag et al. 2021), gated delta with both (Yang et al. 2025):

        S_t = diag(e^g_t) S_{t-1} + k_t u_t^T,  o_t = scale S_t^T q_t,
        u_t = v_t, or beta_t (v_t - (diag(e^g_t) S_{t-1})^T k_t) for the delta rules.

    States are float32 (float64 for float64 inputs). Differentiable in the first six arguments to any order, in
    both modes, and under torch.func; kernels serve the first derivative, the ATen form the others. Raises ArgumentError
    for shapes, dtypes or options that do not fit.
    """
    options = {"scale": scale, "reverse": reverse, "normalize": normalize, "gate_normalizer": gate_normalizer}
    return torch.ops.gatecc.linear_attention(q, k, v, log_decay, beta, initial_state, cu_seqlens, mask, **options)


def bidirectional(*operands: Tensor | None, mean: bool = True, **options: Any) -> Tensor:
    """Mean (or sum) of both directions of ``linear_attention``, o: (B, H, N, Dv); each token meets itself in both.

    Directions that differ in their gates (ViG) are two calls.
    """
    forward, _ = torch.ops.gatecc.linear_attention(*operands, **options)
    backward, _ = torch.ops.gatecc.linear_attention(*operands, **options, reverse=True)
    return (forward + backward) * 0.5 if mean else forward + backward
