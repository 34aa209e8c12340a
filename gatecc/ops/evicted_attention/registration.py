"""What decoder, ONNX and cost know of ``gatecc::evicted_attention``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import Lowering
from gatecc.codegen.onnx.place import place
from gatecc.errors import ExportError
from gatecc.ir.ops import named
from gatecc.ops.attention.cost import pairs
from gatecc.ops.evicted_attention import kernels
from gatecc.ops.evicted_attention import operator as operator  # defines the operator
from gatecc.ops.evicted_attention.cache import reordered
from gatecc.ops.evicted_attention.masked import masked
from gatecc.ops.evicted_attention.presence import Presence, Rule, visibility
from gatecc.ops.paths import Taken
from gatecc.ops.registry import Carry, Operator, StepRule, Unfit, register

Shape = Sequence[int]


def _unfit(node: fx.Node) -> Unfit | None:
    if not named(node, "causal", True):
        return Unfit("eviction from attention that sees later tokens", "a decoder needs a model that is causal")
    if named(node, "window", 0):
        return Unfit(
            "eviction from attention with a sliding window", "leave layers with a window out, by the selector of sites"
        )
    return None


def _one_token(node: fx.Node) -> Callable[..., Any]:
    return kernels.one_token


def _reordered(node: fx.Node, state: Sequence[Tensor], index: Tensor) -> Sequence[Tensor]:
    keys, values, places = state
    rule = Rule(int(named(node, "budget", 0)), int(named(node, "recent", 0)))
    return reordered(keys, values, places, index, rule)


def _pairs(q: Shape, k: Shape, causal: bool = True, window: int = 0, **_: Any) -> int:
    return q[0] * q[1] * pairs(q[2], k[2], causal=causal, window=window or None)


def _flops(q: Shape, k: Shape, v: Shape, *_: Any, slots: int | None = None, **options: Any) -> int:
    """q k^T and p v of the pairs of a query and a key that is there; from shapes alone every key counts."""
    return 2 * (q[3] + v[3]) * (_pairs(q, k, **options) if slots is None else slots)


def _served(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, valid: Tensor | None = None, *cache: Any, **options: Any
) -> tuple[tuple[Tensor, ...], int, int] | None:
    """The pairs of all heads that are there, and how many there would be; None for new tokens behind a cache."""
    if any(x is not None for x in cache):
        return None
    every = _pairs(q.shape, k.shape, **options)
    if not _is_known(keep):
        return (), every, every
    rule = Rule(options.get("budget", 0), options.get("recent", 0))
    seen, _ = visibility(Presence.of(keep, valid, rule), options.get("causal", True), options.get("window", 0), rule)
    return (), int(seen.sum()) * (q.size(1) // k.size(1)), every


def _taken(
    q: Tensor, k: Tensor, v: Tensor, keep: Tensor, valid: Tensor | None = None, *cache: Any, out: Any, **options: Any
) -> Taken | None:
    """How many tokens each key head holds behind the last one."""
    if not _is_known(keep) or any(x is not None for x in cache):
        return None
    rule = Rule(options.get("budget", 0), options.get("recent", 0))
    tokens = keep.size(0) * keep.size(2) if valid is None else int(valid.sum())
    return Taken("kept token", Presence.of(keep, valid, rule).left(rule).sum((0, 2)).tolist(), tokens)


def _is_known(x: Tensor) -> bool:
    return x.device.type != "meta" and not isinstance(x, FakeTensor)


def _check(node: fx.Node) -> None:
    if named(node, "keys") is not None:
        raise ExportError(
            "a cache that shrinks has no ONNX form",
            where=place(node),
            found="heads that hold different numbers of tokens",
            do="export the full forward, or the decoder of the model before the rewrite",
        )


register(
    Operator(
        overload=torch.ops.gatecc.evicted_attention.default,
        step=StepRule(
            operand="k",
            axis=2,
            carries=(Carry("keys", 1, ragged=True), Carry("values", 2, ragged=True), Carry("places", 3)),
            unfit=_unfit,
            one_token=_one_token,
            reordered=_reordered,
        ),
        onnx={"portable": Lowering(masked, _check)},
        flops=_flops,
        served=_served,
        taken=_taken,
        masked=masked,
        kernels=kernels.KERNELS,
    )
)
