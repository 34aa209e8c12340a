"""``gatecc::chosen_blocks`` and ``gatecc::chosen_loss``: schemas, fake kernels, gradients."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from gatecc.ops.chosen_blocks import formula
from gatecc.ops.chosen_blocks.cache import advance
from gatecc.ops.chosen_blocks.formula import Result, masked, no_cache
from gatecc.ops.transforms import LIBRARY, autocast, below_autograd, has_tangents

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor q_raw, Tensor k_raw, Tensor query, Tensor key, Tensor cut, "
    "Tensor? keep=None, Tensor? keys=None, Tensor? values=None, Tensor? features=None, Tensor? running=None, "
    "Tensor? valid=None, Tensor? length=None"
)
_RESULTS = "Tensor out, Tensor keys, Tensor values, Tensor features, Tensor running, Tensor valid, Tensor length"
_OPTIONS = "int block, float scale, float base=0.0, bool ranked=True, bool spread=False"
LIBRARY.define(f"chosen_blocks({_TENSORS}, *, {_OPTIONS}) -> ({_RESULTS})")


def _forward(*tensors: Any, **options: Any) -> Result:
    with torch.no_grad():
        if len(tensors) > 9 and tensors[9] is not None:
            return advance(*tensors, **options)
        out, *cache = masked(*tensors[:9], **options)
        return out.contiguous(), *cache  # pyright: ignore[reportReturnType]


def _fake(q: Tensor, k: Tensor, v: Tensor, q_raw: Tensor, k_raw: Tensor, query: Tensor, *_: Any, **__: Any) -> Result:
    return q.new_empty((*q.shape[:3], v.size(3))), *no_cache(q, k, v, query)


def _autograd(keys: Any, *tensors: Any, **options: Any) -> Any:
    learns = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors[:3])
    if learns or has_tangents(tensors):
        return masked(*tensors, **options)
    return below_autograd(_OPERATOR, keys, options, *tensors)


def _of_one_dtype(tensors: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """Under autocast q, k and v meet in the widest of their dtypes; the gate stays as it is."""
    widest = functools.reduce(torch.promote_types, (x.dtype for x in tensors[:3] if x is not None))
    return (*(None if x is None else x.to(widest) for x in tensors[:3]), *tensors[3:])


LIBRARY.impl("chosen_blocks", _forward, "CompositeExplicitAutograd")
torch.library.register_fake("gatecc::chosen_blocks", _fake, lib=LIBRARY)
_OPERATOR = torch.ops.gatecc.chosen_blocks.default
LIBRARY.impl("chosen_blocks", _autograd, "Autograd", with_keyset=True)
autocast(_OPERATOR, _of_one_dtype, masked)


@torch.library.custom_op("gatecc::chosen_loss", mutates_args=())
def chosen_loss(
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    block: int,
    scale: float,
    base: float,
) -> Tensor:
    """What the gate learns by, see `gatecc.ops.chosen_blocks.formula.loss`: (). Differentiable once, in ``query`` and
    ``key`` alone."""
    return formula.loss(q_raw, k_raw, q, k, query, key, keep, block, scale, base)


@chosen_loss.register_fake
def _(q_raw: Tensor, k_raw: Tensor, *_: Any) -> Tensor:
    return torch.empty((), device=k_raw.device)


@torch.library.custom_op("gatecc::chosen_loss_backward", mutates_args=())
def chosen_loss_backward(
    grad: Tensor,
    q_raw: Tensor,
    k_raw: Tensor,
    q: Tensor,
    k: Tensor,
    query: Tensor,
    key: Tensor,
    keep: Tensor | None,
    block: int,
    scale: float,
    base: float,
) -> tuple[Tensor, Tensor]:
    """The gradients of ``query`` and ``key``."""

    def forward(query: Tensor, key: Tensor) -> Tensor:
        return formula.loss(q_raw, k_raw, q, k, query, key, keep, block, scale, base)

    found = torch.func.vjp(forward, query, key)[1](grad)
    return found[0].contiguous(), found[1].contiguous()


@chosen_loss_backward.register_fake
def _(
    grad: Tensor, q_raw: Tensor, k_raw: Tensor, q: Tensor, k: Tensor, query: Tensor, key: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.block, ctx.scale, ctx.base = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    options = ctx.block, ctx.scale, ctx.base
    query, key = torch.ops.gatecc.chosen_loss_backward(grad, *ctx.saved_tensors, *options)
    return None, None, None, None, query, key, None, None, None, None


chosen_loss.register_autograd(_backward, setup_context=_setup)
