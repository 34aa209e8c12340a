"""gelu: GELU, exact or by tanh, in any spelling, with the bias in front of it, is one node.

``BiasGelu`` and ``FastGelu`` of ONNX Runtime take the bias of the product; Gelu of the standard (opset 20) has none.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel, written_in_place
from gatecc.codegen.onnx.lower.write import Writer, aten
from gatecc.ir.ops import opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.pattern import Match, Part, Pattern, Patterns, anything, call, constant, one_of
from gatecc.ir.program import fake

_X = anything("x")


def _near(value: float) -> Part:
    return constant(_is_near(value))


def _is_near(value: float) -> Callable[[object], bool]:
    return lambda given: isinstance(given, int | float) and abs(given - value) <= 1e-6 * abs(value)


def _tanh_form() -> Part:
    cube = one_of(call("pow", _X, 3), call("mul", call("mul", _X, _X), _X))
    inner = call("add", _X, call("mul", cube, _near(0.044715)))
    factored = call("mul", _X, call("add", call("mul", call("mul", _X, _X), _near(0.044715)), 1))
    tanh = call("tanh", call("mul", one_of(inner, factored), _near(math.sqrt(2 / math.pi))))
    return _halved(call("add", tanh, 1))


def _erf_form() -> Part:
    scaled = one_of(call("div", _X, _near(math.sqrt(2))), call("mul", _X, _near(math.sqrt(0.5))))
    return _halved(call("add", call("erf", scaled), 1))


def _halved(factor: Part) -> Part:
    """0.5 * x * factor, in whatever order."""
    return one_of(
        call("mul", call("mul", _X, 0.5), factor),
        call("mul", call("mul", _X, factor), 0.5),
        call("mul", _X, call("mul", factor, 0.5)),
    )


_PATTERNS = Patterns(
    Pattern("gelu", call("gelu", _X)),
    Pattern("gelu tanh", call("gelu", _X, approximate="tanh")),
    Pattern("gelu tanh", _tanh_form()),
    Pattern("gelu", _erf_form()),
)


class Gelu(GraphLowering):
    """gelu(x + bias) -> BiasGelu, FastGelu, or Gelu."""

    name = "gelu"
    after = ("copies",)
    since = 20

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for match in _PATTERNS.find(flow).matches:
            found = "GELU by tanh" if match.pattern.name.endswith("tanh") else "GELU"
            if reason := lacking_kernel(match["x"], match.root) or written_in_place(match, flow):
                yield self.left(match.root, found, reason)
                continue
            op, made = self._write(subject, match)
            match.root.replace_all_uses_with(made)
            yield self.done(match.root, found, op)

    def _write(self, subject: Subject, match: Match) -> tuple[str, fx.Node]:
        x, tanh = match["x"], match.pattern.name.endswith("tanh")
        writer = Writer(subject.program, match.root, self.name)
        own = subject.target == "ort" and match.root.meta["val"].dtype == torch.float32
        if own and (tanh or _biased(match)):
            op, inputs = ("FastGelu" if tanh else "BiasGelu"), [x]
            if _biased(match):
                given: Any = x.args
                inputs = [writer.called(x, aten.linear.default, *given[:2]), given[2]]
            return op, writer.onnx(f"com.microsoft::{op}", inputs, {}, match.root)
        attributes = {"approximate": "tanh" if tanh else "none"}
        return "Gelu", writer.onnx("Gelu", [x], attributes, match.root)


def _biased(match: Match) -> bool:
    """Whether x is a product with a bias, which nobody else reads."""
    x = match["x"]
    held = fake(x)
    alone = all(user in match.inner for user in x.users)
    return opname(x) == "linear" and isinstance(x.args[2], fx.Node) and alone and held is not None and held.dim() > 2


__all__ = ["Gelu"]
