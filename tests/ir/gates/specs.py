"""Hypothesis strategies: gate specs that are accepted, and places where they can stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateShape, GateSpec, SourceShape
from gatecc.ir.gates.source import Cond, Pool, Source

T = TypeVar("T")
B, N, H, D, C = 3, 5, 4, 2, 6
SIZES = {"h": H, "d": D, "c": H * D, "e": 3, "n": N, "y": 2, "x": 3}

VALUES: dict[str, tuple[int, ...]] = {
    "bhnd": (B, H, N, D),
    "bnhd": (B, N, H, D),
    "gnd": (B * H, N, D),
    "bnc": (B, N, H * D),
    "bcyx": (B, H * D, 2, 3),
    "byxc": (B, 2, 3, H * D),
    "bcn": (B, H * D, N),
}
VALUE_AXES = sorted(VALUES)

SOURCES = (
    "hidden",
    "self",
    "param",
    "pool(hidden)",
    "pool(hidden, kind=max)",
    "hidden+self",
    "cond(t)",
    "pool(self)+cond(t)",
)
SCORERS = (
    "linear",
    "linear(bias=False)",
    "lowrank(2)",
    "mlp(3, activation=silu)",
    "attn",
    "rnn(3)",
    "conv(3)",
    "none",
)
GRANULARITIES = ("head", "element", "channel", "token", "scalar", "sample", "token*head", "expert")
ACTIVATIONS = (
    "sigmoid",
    "sigmoid(scale=2.0)",
    "sigmoid(bias=6.0, slope=0.5)",
    "tanh",
    "1+tanh",
    "softmax(T=2)",
    "softmax(scale=size, pre_activation=tanh)",
    "topk(2)",
    "threshold(0.4)",
    "sinkhorn(iters=4)",
    "decay(c=4.0)",
    "logsigmoid(16)",
    "linear",
    "relu",
    "silu",
)
ESTIMATORS = (
    "exact",
    "st",
    "st(to=logit, stochastic=False)",
    "gumbel(T=0.5)",
    "gumbel(discrete=True)",
    "reinforce(baseline=leave_one_out)",
    "times_smooth",
    "noise(std=0.1)",
    "supervised",
    "frozen",
)
INITS = ("identity", "identity(how=fold)", "identity(how=bias, bias=8.0)", "zero", "uniform", "random(std=0.5)")


@st.composite
def specs(draw: st.DrawFn, inits: tuple[str, ...] = INITS) -> GateSpec:
    """Specs whose choices go together; the others are drawn again."""
    choices = [draw(st.sampled_from(row)) for row in (SOURCES, SCORERS, GRANULARITIES, ACTIVATIONS, ESTIMATORS, inits)]
    if choices[0] == "param":
        choices[1] = "none"
    spec = made(lambda: GateSpec(*choices))
    if spec is None:
        return draw(specs(inits))
    return spec


def made(make: Callable[[], T]) -> T | None:
    """What is made, or None if gatecc refuses to."""
    try:
        return make()
    except ArgumentError:
        return None


def place(spec: GateSpec, axes: str) -> tuple[GateShape, Tensor, tuple[Tensor, ...]]:
    """A place for a gate over a value of these axes, the value, and a tensor for each of its sources."""
    value = torch.randn(VALUES[axes])
    pairs = [_source(part, axes, value) for part in spec.source.parts if spec.sources]
    return GateShape(axes, SIZES, tuple(s for s, _ in pairs)), value, tuple(x for _, x in pairs)


def _source(source: Source, axes: str, value: Tensor) -> tuple[SourceShape, Tensor]:
    inner = source.of if isinstance(source, Pool) else source
    if isinstance(inner, Cond):
        return SourceShape("b"), torch.rand(B)
    if str(inner) == "self":
        return SourceShape(axes, H * D), value
    if "y" in axes:
        return SourceShape("bcyx", C), torch.randn(B, C, 2, 3)
    return SourceShape("bnc", C), torch.randn(B, N, C)
