"""Regions that no template names: functions of tensors drawn by hypothesis, with tensors to call them on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.judge.family import DTYPES

UNARY: dict[str, Callable[[Tensor], Tensor]] = {
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu(tanh)": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "mish": F.mish,
    "relu": F.relu,
    "elu": F.elu,
    "leaky": lambda x: F.leaky_relu(x, 0.2),
    "hardswish": F.hardswish,
    "logsigmoid": F.logsigmoid,
    "exp": lambda x: torch.exp(torch.tanh(x)),
    "log": lambda x: torch.log(x.abs() + 0.5),
    "log1p": lambda x: torch.log1p(x.abs()),
    "expm1": lambda x: torch.expm1(torch.tanh(x)),
    "sqrt": lambda x: torch.sqrt(x.abs() + 0.1),
    "rsqrt": lambda x: torch.rsqrt(x.abs() + 0.5),
    "square": lambda x: torch.tanh(x).square(),
    "cube": lambda x: torch.tanh(x) ** 3,
    "sin": torch.sin,
    "cos": torch.cos,
    "erf": torch.erf,
    "neg": lambda x: -x,
    "affine": lambda x: 0.5 * x - 1.25,
    "clamp": lambda x: x.clamp(-0.7, 0.9),
    "softmax": lambda x: torch.softmax(x, -1),
    "log_softmax": lambda x: torch.log_softmax(x, -1),
    "rms": lambda x: F.rms_norm(x, (x.size(-1),), eps=1e-3),
    "norm": lambda x: F.layer_norm(x, (x.size(-1),), eps=1e-3),
    "mean": lambda x: x - x.mean(-1, keepdim=True),
    "amax": lambda x: x / (x.abs().amax(-1, keepdim=True) + 1),
    "spread": lambda x: x * torch.rsqrt(x.var(-1, keepdim=True) + 0.1),
    "half": lambda x: x.bfloat16().to(x.dtype) if x.dtype == torch.float32 else x,
}
CONTINUOUS = set(UNARY) - {"relu", "elu", "leaky", "hardswish", "half", "amax", "log", "log1p", "sqrt", "rsqrt"}
REDUCING = ("softmax", "log_softmax", "rms", "norm", "mean", "amax", "spread")
BINARY: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "add": lambda x, y: x + y,
    "sub": lambda x, y: x - 2 * y,
    "mul": lambda x, y: torch.tanh(x) * y,
    "div": lambda x, y: x / (y.abs() + 1),
    "max": torch.maximum,
    "lerp": lambda x, y: torch.lerp(x, y, 0.25),
    "where": lambda x, y: torch.where(x >= y, x, y),
    "addcmul": lambda x, y: torch.addcmul(x, torch.tanh(x), torch.tanh(y), value=0.5),
}
_AT_ONCE = 20


@dataclass(frozen=True)
class Drawn:
    """A region. ``shapes`` of its inputs; those of ``weights`` are right operands of products."""

    dtype: str
    steps: tuple[Any, ...]
    shapes: tuple[Any, ...]
    weights: tuple[int, ...]
    outputs: tuple[int, ...]

    def __call__(self, *tensors: Tensor) -> Any:
        values = list(tensors)
        for kind, *rest in self.steps:
            if kind == "unary":
                values.append(UNARY[rest[0]](values[rest[1]]))
            elif kind == "binary":
                values.append(BINARY[rest[0]](values[rest[1]], values[rest[2]]))
            else:
                values.append(
                    F.linear(values[rest[0]], values[rest[1]]) if rest[2] else values[rest[0]] @ values[rest[1]]
                )
        found: tuple[Any, ...] = tuple(values[i] for i in self.outputs)
        return found if len(self.outputs) > 1 else found[0]

    @property
    def smooth(self) -> bool:
        """Whether its gradient has no jumps, beside which two computations may fall to different sides."""
        return all(
            kind == "product" or rest[0] in (CONTINUOUS if kind == "unary" else set(BINARY) - {"max", "where", "div"})
            for kind, *rest in self.steps
        )

    def many(self, rows: int, **options: Any) -> list[Tensor]:
        """Empty tensors of at least so many rows: the first axis is longer."""
        lead = self.shapes[0][:-1]
        first = -(-rows // math.prod(lead[1:]))
        return [torch.empty((first, *s[1:]) if s[:-1] == lead else s, **options) for s in self.shapes]

    def tensors(self) -> list[Tensor]:
        return [
            torch.randn(s, dtype=torch.float64) * (s[-1] ** -0.5 if i in self.weights else 1)
            for i, s in enumerate(self.shapes)
        ]


@st.composite
def regions(draw: st.DrawFn) -> Drawn:
    dtype = draw(st.sampled_from(list(DTYPES)))
    lead = (*draw(st.lists(st.integers(2, 6), min_size=1, max_size=2)), draw(st.integers(2, 9)))
    N, K = draw(st.integers(3, 70)), draw(st.integers(3, 40))
    shapes: list[tuple[int, ...]] = [(*lead, N)]
    steps, weights = list[tuple[Any, ...]](), list[int]()
    for kind in draw(st.lists(st.sampled_from(["tile", "row", "column", "scalar", "last"]), max_size=3)):
        shapes.append(
            {"tile": (*lead, N), "row": (N,), "column": (*lead, 1), "scalar": (1,), "last": (lead[-1], N)}[kind]
        )
    operands = list(range(len(shapes)))  # what steps read: values over columns
    products = draw(st.sampled_from([0, 0, 1, 2]))
    if products:
        left, linear = len(shapes), draw(st.booleans())
        before = draw(st.sampled_from(["", "", "mul", "rms", "norm", "softmax", "amax", "silu"]))
        low = draw(st.integers(2, 20)) if draw(st.integers(0, 3)) == 0 else 0  # columns between two products
        sizes = [(K, low), (low, N)][2 - 2 * bool(low) :] + [(K, N)] * (products - bool(low))
        shapes += [(*lead, K), (*lead, K), *((n, k) if linear else (k, n) for k, n in sizes)]
        weights = list(range(left + 2, len(shapes)))
        at = left
        if before:
            steps.append(("binary", "mul", left, left + 1) if before == "mul" else ("unary", before, left))
            at = len(shapes)
        if low:
            steps += [("product", at, weights[0], linear), ("unary", "silu", len(shapes) + len(steps))]
            at = len(shapes) + len(steps) - 1
        current = list[int]()
        for i, w in enumerate(weights[bool(low) :]):
            current.append(len(shapes) + len(steps))
            steps.append(("product", left if i else at, w, linear))
        operands = [*operands, *current]
    else:
        current = [0]
    where = len(shapes) + len(steps)
    tiles = [0, *current]
    for _ in range(draw(st.integers(1, 5))):
        source = draw(st.sampled_from(tiles))
        if draw(st.booleans()):
            steps.append(("unary", draw(st.sampled_from(sorted(UNARY))), source))
        else:
            steps.append(("binary", draw(st.sampled_from(sorted(BINARY))), source, draw(st.sampled_from(operands))))
        operands.append(where)
        tiles.append(where)
        where += 1
    outputs = (where - 1,) if draw(st.booleans()) or len(steps) < 2 else (where - 1, where - 2)
    return _used(Drawn(dtype, tuple(steps), tuple(shapes), tuple(weights), tuple(outputs)))


def _used(region: Drawn) -> Drawn:
    """Without what no result reads."""
    inputs, kept = len(region.shapes), set(region.outputs)
    for place in range(inputs + len(region.steps) - 1, inputs - 1, -1):
        if place in kept:
            kept.update(_read(region.steps[place - inputs]))
    moved = {old: new for new, old in enumerate(sorted(kept))}
    steps = [
        (kind, *[moved[x] if type(x) is int else x for x in rest])
        for place, (kind, *rest) in enumerate(region.steps, inputs)
        if place in kept
    ]
    return Drawn(
        region.dtype,
        tuple(steps),
        tuple(s for place, s in enumerate(region.shapes) if place in kept),
        tuple(moved[w] for w in region.weights if w in kept),
        tuple(moved[o] for o in region.outputs),
    )


def _read(step: tuple[Any, ...]) -> list[int]:
    return [x for x in step if type(x) is int]  # not the flag of a product


def drawn(first: int, last: int) -> list[Drawn]:
    """Regions of several steps by their numbers, the same in every run and in every cut of the numbers."""
    found = [region for part in range(first // _AT_ONCE, -(-last // _AT_ONCE)) for region in _part(part)]
    return found[first % _AT_ONCE :][: last - first]


def _part(number: int) -> list[Drawn]:
    """So many regions of one seed, each once."""
    found: dict[Drawn, None] = {}

    @seed(number)
    @settings(
        max_examples=4 * _AT_ONCE,
        phases=[Phase.generate],
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
    )
    @given(region=regions())
    def draw(region: Drawn) -> None:
        if len(region.steps) > 1:
            found.setdefault(region)

    draw()
    assert len(found) >= _AT_ONCE
    return list(found)[:_AT_ONCE]
