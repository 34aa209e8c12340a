"""silu: x * sigmoid(alpha * x) is QuickGelu of ONNX Runtime, one node."""

from __future__ import annotations

from collections.abc import Iterator

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel, written_in_place
from gatecc.codegen.onnx.lower.write import Writer
from gatecc.ir.outcome import Outcome
from gatecc.ir.pattern import Pattern, Patterns, anything, call, constant, one_of
from gatecc.ir.sizes import node_shape

_X = anything("x")
_SCALED = call("mul", _X, constant(lambda a: isinstance(a, float) and a > 0, "alpha"))
_PATTERNS = Patterns(
    Pattern("silu", call("silu", _X)),
    Pattern("x * sigmoid(x)", call("mul", _X, call("sigmoid", one_of(_SCALED, _X)))),
)


class Silu(GraphLowering):
    """x * sigmoid(alpha * x) -> QuickGelu."""

    name = "silu"
    after = ("copies", "short-convolution")
    targets = ("ort",)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for match in _PATTERNS.find(flow).matches:
            reason = lacking_kernel(match["x"], match.root) or written_in_place(match, flow)
            if (node_shape(match["x"]) or ()) != (node_shape(match.root) or ()):
                reason = "x is not of the shape of its sigmoid"
            if reason:
                yield self.left(match.root, "SiLU", reason)
                continue
            alpha = float(match.constants.get("alpha", 1.0))
            writer = Writer(subject.program, match.root, self.name)
            made = writer.onnx("com.microsoft::QuickGelu", [match["x"]], {"alpha": alpha}, match.root)
            match.root.replace_all_uses_with(made)
            yield self.done(match.root, "SiLU", "QuickGelu")


__all__ = ["Silu"]
