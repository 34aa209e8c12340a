"""``gatecc::attention``: schema, fake kernel, autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatecc.ops.attention import differentiable, kernels
from gatecc.ops.attention.arguments import TENSORS, padded, read
from gatecc.ops.transforms import LIBRARY, UNDER_FUNC, autocast, below_autograd, fake_gradients, learn

_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor? gate=None, Tensor? bias=None, Tensor? sinks=None"
_OPTIONS = (
    'float? scale=None, bool causal=False, int? window=None, float? softcap=None, str gate_activation="identity", '
    "Tensor? blocks=None, int[] block_sizes=[64, 64]"
)
LIBRARY.define(f"attention({_TENSORS}, *, {_OPTIONS}) -> (Tensor out, Tensor logsumexp)")
LIBRARY.define(
    "attention_backward(Tensor grad, Tensor? grad_logsumexp, Tensor out, Tensor logsumexp, "
    f"{_TENSORS}, *, bool[] needs, {_OPTIONS}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


def _forward(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return kernels.forward(read(tensors, options))


def _fake(*tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    a = read(tensors, options)
    return a.new_output(), a.new_logsumexp()


def _backward(
    grad: Tensor,
    grad_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *tensors: Tensor | None,
    needs: list[bool],
    **options: Any,
) -> tuple[Tensor, ...]:
    """Gradients of the six tensors, contiguous; an empty tensor for one that is not needed."""
    a = read(tensors, options)
    found = kernels.backward(a, out, logsumexp, grad, grad_logsumexp, needs)
    return tuple(
        grad.new_empty(0) if g is None or x is None else g.to(x.dtype).contiguous()
        for g, x in zip(found, a.tensors, strict=True)
    )


def _fake_backward(
    grad: Tensor,
    grad_logsumexp: Tensor | None,
    out: Tensor,
    logsumexp: Tensor,
    *tensors: Tensor | None,
    needs: list[bool],
    **options: Any,
) -> tuple[Tensor, ...]:
    return fake_gradients(grad, padded(tensors), needs)


class _Differentiable(torch.autograd.Function):
    """The operator on tensors of which some need a gradient."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        out, logsumexp = below_autograd(_OPERATOR, keys, options, *tensors)
        ctx.save_for_backward(out, logsumexp, *tensors)
        ctx.options = options
        ctx.set_materialize_grads(False)
        return out, logsumexp

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        out, logsumexp, *tensors = ctx.saved_tensors
        grad, grad_logsumexp = grads
        if grad is None:
            if grad_logsumexp is None:
                return (None, None, *[None] * len(tensors))
            grad = torch.zeros_like(out)
        wanted = ctx.needs_input_grad[2:]
        needs = [i < len(tensors) and tensors[i] is not None and wanted[i] for i in range(TENSORS)]
        found = _GRADIENT(grad, grad_logsumexp, out, logsumexp, *tensors, needs=needs, **ctx.options)
        return (None, None, *(found[i] if needs[i] else None for i in range(len(tensors))))


class _Gradient(torch.autograd.Function):
    """Its gradient where that is differentiated in turn (``create_graph=True``)."""

    @staticmethod
    def forward(ctx: Any, keys: Any, options: dict[str, Any], *tensors: Tensor | None) -> tuple[Tensor, ...]:
        ctx.save_for_backward(*tensors[:2], *tensors[4:])
        ctx.options = options
        return below_autograd(_GRADIENT, keys, options, *tensors)

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Tensor | None, ...]:
        grad, grad_logsumexp, *tensors = ctx.saved_tensors
        options = dict(ctx.options)
        found = differentiable.second(cotangents, grad, grad_logsumexp, tuple(tensors), options.pop("needs"), options)
        # The result and its logsumexp are taken for functions of the others, and so is their part of the gradient.
        return (None, None, *found[:2], None, None, *found[2:])


def _of_one_dtype(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under autocast q, k and v are cast as those of the fused operator of torch are, float64 aside."""
    first = tensors[0]
    assert first is not None
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors[:3] if x is not None))
    dtype = widest if widest == torch.float64 else torch.get_autocast_dtype(first.device.type)
    return (*(None if x is None else x.to(dtype) for x in tensors[:3]), *tensors[3:])


LIBRARY.impl("attention", _forward, "CompositeExplicitAutograd")
LIBRARY.impl("attention_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::attention", _fake, lib=LIBRARY)
torch.library.register_fake("gatecc::attention_backward", _fake_backward, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.attention.default
_GRADIENT = torch.ops.gatecc.attention_backward.default
learn(_OPERATOR, _Differentiable, differentiable.forward)
learn(_GRADIENT, _Gradient, differentiable.gradients)
autocast(_OPERATOR, _of_one_dtype, differentiable.forward)
LIBRARY.impl("attention_backward", differentiable.gradients, UNDER_FUNC)


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float | None = None,
    causal: bool = False,
    window: int | None = None,
    softcap: float | None = None,
    gate_activation: str = "identity",
    blocks: Tensor | None = None,
    block_sizes: Sequence[int] = (64, 64),
) -> tuple[Tensor, Tensor]:
    """Softmax attention with what surrounds it: out (B, H, N, E) in q's dtype, and the logsumexp of scores (B, H, N).

        s_ij = cap(scale q_i k_j) + bias_ij,  p_ij = e^s_ij / (e^sink + sum over the j that i sees of e^s_ij),
        out_i = act(gate_i) * sum over j of p_ij v_j.

    Args:
        q: (B, H, N, D), in float32, bfloat16, float16 or float64.
        k: (B, G, S, D). G divides H: head h reads head h // (H / G) of k and v.
        v: (B, G, S, E).
        gate: (B, H, N, E), or (B, H, N, 1) for one per head, of any floating-point dtype. It multiplies the result.
        bias: four axes that broadcast to (B, H, N, S): numbers, -inf for keys that are not seen, or booleans, True for
            those that are.
        sinks: (H,), a further score of each head's, which no value belongs to (gpt-oss). It is not capped.
        scale: D ** -0.5 if not given.
        causal: the last query sees all keys, the one before it one fewer, and so on: query i stands at the place
            S - N + i of the keys, and sees those up to it.
        window: a query sees the keys less than so many places before it, and unless ``causal`` behind it.
        softcap: cap(s) = softcap tanh(s / softcap) (Gemma 2), before the bias.
        gate_activation: "sigmoid" or "silu" where the gate holds logits, else "identity".
        blocks: booleans, four axes, the first two B and H or 1, the others N and S over the sizes of a block, rounded
            up: queries of a block see keys of another only where it is True. Kernels read no others.
        block_sizes: how many queries and how many keys a block has.

    A query that sees no key yields zeros, and a logsumexp of -inf; the sink belongs to the logsumexp. Scores are summed
    in float32 (float64 for float64), which the logsumexp has. Differentiable in all six, to any order, in both modes,
    and under torch.func; kernels serve the first derivative, the others take memory for N * S scores. Raises
    ArgumentError for shapes, dtypes or options that do not fit.

    In blocks, with the sums of before rescaled: Dao et al. 2022. Gates on the result: Qiu et al. 2025.
    """
    return torch.ops.gatecc.attention(
        q,
        k,
        v,
        gate,
        bias,
        sinks,
        scale=scale,
        causal=causal,
        window=window,
        softcap=softcap,
        gate_activation=gate_activation,
        blocks=blocks,
        block_sizes=list(block_sizes),
    )
