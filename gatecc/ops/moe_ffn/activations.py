"""The nonlinearities of ``gatecc::moe_ffn``, by their text: "silu", "gelu(tanh)", "swiglu(alpha=1.702, limit=7.0)".

Names are those of torch.nn.functional where it has one. A pointwise function stands alone in an ungated expert and
multiplies the up half of a gated one; ``swiglu`` is a function of both halves.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError

Layout = Literal["halves", "interleaved", "plain"]
LAYOUTS: tuple[Layout, ...] = ("halves", "interleaved", "plain")

_aten = torch.ops.aten


class _Function(NamedTuple):
    """A function of x, the gradient of x given that of the result, and the options with what they are if left out."""

    value: Callable[..., Tensor]
    gradient: Callable[..., Tensor]  # (grad, x, options)
    options: Mapping[str, float] = MappingProxyType({})


def _quick(grad: Tensor, x: Tensor) -> Tensor:
    s = torch.sigmoid(1.702 * x)
    return grad * s * (1 + 1.702 * x * (1 - s))


_POINTWISE: dict[str, _Function] = {
    "identity": _Function(lambda x: x, lambda g, x: g),
    "relu": _Function(F.relu, lambda g, x: g * (x > 0)),
    "relu2": _Function(lambda x: F.relu(x).square(), lambda g, x: g * 2 * F.relu(x)),
    "relu6": _Function(F.relu6, lambda g, x: _aten.hardtanh_backward(g, x, 0, 6)),
    "silu": _Function(F.silu, _aten.silu_backward),
    "gelu": _Function(F.gelu, _aten.gelu_backward),
    "gelu(tanh)": _Function(
        partial(F.gelu, approximate="tanh"), lambda g, x: _aten.gelu_backward(g, x, approximate="tanh")
    ),
    "quick_gelu": _Function(lambda x: x * torch.sigmoid(1.702 * x), _quick),
    "tanh": _Function(torch.tanh, lambda g, x: _aten.tanh_backward(g, torch.tanh(x))),
    "sigmoid": _Function(torch.sigmoid, lambda g, x: _aten.sigmoid_backward(g, torch.sigmoid(x))),
    "mish": _Function(F.mish, _aten.mish_backward),
    "softplus": _Function(F.softplus, lambda g, x: _aten.softplus_backward(g, x, 1, 20)),
    "hardswish": _Function(F.hardswish, _aten.hardswish_backward),
    "leaky_relu": _Function(
        lambda x, slope: F.leaky_relu(x, slope),
        lambda g, x, slope: _aten.leaky_relu_backward(g, x, slope, False),
        {"slope": 0.01},
    ),
    "elu": _Function(
        lambda x, alpha: F.elu(x, alpha),
        lambda g, x, alpha: _aten.elu_backward(g, alpha, 1, 1, False, x),
        {"alpha": 1.0},
    ),
    "selu": _Function(F.selu, lambda g, x: _aten.elu_backward(g, *_SELU, 1, False, x)),
}
_SELU = (1.6732632423543772, 1.0507009873554805)  # alpha and scale of Klambauer et al. 2017


def _swiglu(gate: Tensor, up: Tensor, alpha: float, limit: float) -> Tensor:
    """gpt-oss: both halves clamped, the up half around one."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + 1)


def _swiglu_gradient(grad: Tensor, gate: Tensor, up: Tensor, alpha: float, limit: float) -> tuple[Tensor, Tensor]:
    of_gate, of_up = gate <= limit, (up >= -limit) & (up <= limit)
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    s = torch.sigmoid(alpha * gate)
    return grad * (up + 1) * s * (1 + alpha * gate * (1 - s)) * of_gate, grad * gate * s * of_up


class _FunctionOfBoth(NamedTuple):
    """The same of gate and up."""

    value: Callable[..., Tensor]
    gradient: Callable[..., tuple[Tensor, Tensor]]  # (grad, gate, up, options)
    options: Mapping[str, float]


_OF_BOTH = {"swiglu": _FunctionOfBoth(_swiglu, _swiglu_gradient, {"alpha": 1.702, "limit": 7.0})}
_CALL = re.compile(r"(\w+)\((.*)\)")


@dataclass(frozen=True)
class Activation:
    """One nonlinearity with its options. ``of_both``: it takes gate and up, not the gate alone."""

    name: str
    of_both: bool
    options: Mapping[str, float] = field(default_factory=dict[str, float], hash=False)

    def pointwise(self, x: Tensor) -> Tensor:
        """Of an ungated expert. x and the result: any shape."""
        return _POINTWISE[self.name].value(x, **self.options)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Of a gated one. gate, up and the result: of one shape."""
        if self.of_both:
            return _OF_BOTH[self.name].value(gate, up, **self.options)
        return self.pointwise(gate) * up

    def hidden(self, h: Tensor, layout: Layout) -> Tensor:
        """What the down projection reads. h: (..., 2F), or (..., F) in the plain layout -> (..., F)."""
        if layout == "plain":
            return self.pointwise(h)
        return self.gated(*_parts(h, layout))

    def gradient(self, grad: Tensor, h: Tensor, layout: Layout) -> Tensor:
        """The gradient of h, given that of ``hidden(h, layout)``."""
        if layout == "plain":
            return _POINTWISE[self.name].gradient(grad, h, **self.options)
        gate, up = _parts(h, layout)
        if self.of_both:
            both = _OF_BOTH[self.name].gradient(grad, gate, up, **self.options)
        else:
            of_gate = _POINTWISE[self.name].gradient(grad * up, gate, **self.options)
            both = of_gate, grad * self.pointwise(gate)
        return torch.cat(both, -1) if layout == "halves" else torch.stack(both, -1).flatten(-2)


def _parts(h: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Gate and up."""
    gate, up = h.chunk(2, -1) if layout == "halves" else h.unflatten(-1, (-1, 2)).unbind(-1)
    return gate, up


def names() -> list[str]:
    """All activations."""
    return [*_POINTWISE, *_OF_BOTH]


@lru_cache
def activation(text: str) -> Activation:
    """Read an activation. Raises ArgumentError for a name or an option that there is not."""
    if text in _POINTWISE:
        return Activation(text, of_both=False, options=_POINTWISE[text].options)
    call = _CALL.fullmatch(text)
    name, given = (text, "") if call is None else call.groups()
    table = {**_POINTWISE, **_OF_BOTH}
    if name not in table:
        raise ArgumentError("no such activation of experts", found=text, expected=", ".join(names()))
    known = table[name].options
    return Activation(name, name in _OF_BOTH, {**known, **_options(text, given, known)})


def _options(text: str, given: str, known: Mapping[str, float]) -> dict[str, float]:
    found = dict[str, float]()
    for part in filter(None, map(str.strip, given.split(","))):
        key, equals, value = map(str.strip, part.partition("="))
        try:
            found[key] = float(value)
        except ValueError:
            equals = ""
        if not equals or key not in known:
            expected = ", ".join(f"{key}=a number" for key in known) or "no options"
            raise ArgumentError("an activation of experts has no such option", found=text, expected=expected)
    return found
