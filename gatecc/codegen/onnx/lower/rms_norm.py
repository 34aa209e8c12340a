"""rms-norm: a root mean square norm, in any spelling, is RMSNormalization (opset 23)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import fx

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, lacking_kernel, written_in_place
from gatecc.codegen.onnx.lower.write import Writer
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, SAME_SHAPE, opname
from gatecc.ir.outcome import Outcome
from gatecc.ir.pattern import Match, Part, Pattern, Patterns, anything, call, constant, one_of, through
from gatecc.ir.program import fake
from gatecc.ir.sizes import node_shape, same

_SEEN = CASTS | SAME_SHAPE


def _spelled() -> Part:
    x = through(_SEEN, anything("x"))
    square = one_of(call("pow", x, 2), call("mul", x, x), call("square", x))
    mean = call("mean", square, constant(lambda d: d in ([-1], (-1,)) or _last(d), "axes"), True)
    variance = call("add", mean, constant(lambda e: isinstance(e, float) and 0 < e < 1e-2, "eps"))
    root, inverse = call("sqrt", variance), one_of(call("rsqrt", variance), call("pow", variance, -0.5))
    inverse = one_of(inverse, call("reciprocal", root))
    normal = one_of(call("mul", x, through(_SEEN, inverse)), call("div", x, through(_SEEN, root)))
    return call("mul", through(_SEEN, normal), anything("weight"))


def _last(axes: object) -> bool:
    return isinstance(axes, list | tuple) and len(axes) == 1 and isinstance(axes[0], int) and axes[0] > 0


_PATTERNS = Patterns(
    Pattern("rms-norm", _spelled()),
    Pattern(
        "rms_norm", call("rms_norm", anything("x"), constant(name="shape"), anything("weight"), constant(name="eps"))
    ),
)


class RmsNorm(GraphLowering):
    """x * rsqrt(mean(x^2) + eps) * weight -> RMSNormalization."""

    name = "rms-norm"
    after = ("copies",)
    since = 23

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for match in _PATTERNS.find(flow).matches:
            reason = _unfit(match, flow) or written_in_place(match, flow)
            if reason:
                yield self.left(match.root, "an RMS norm", reason)
                continue
            writer = Writer(subject.program, match.root, self.name)
            attributes = {"axis": -1, "epsilon": _epsilon(match)}
            made = writer.onnx("RMSNormalization", [match["x"], match["weight"]], attributes, match.root)
            match.root.replace_all_uses_with(made)
            yield self.done(match.root, "an RMS norm", "RMSNormalization", "read operator by operator")


def _epsilon(match: Match) -> float:
    given = match.constants.get("eps")
    dtype = match.root.meta["val"].dtype
    return float(torch.finfo(dtype).eps if given is None else given)


def _unfit(match: Match, flow: Flow) -> str:
    """Why the node would compute something else."""
    x, weight, out = match["x"], match["weight"], match.root
    width = (node_shape(x) or (0,))[-1]
    axes = match.constants.get("axes", match.constants.get("shape"))
    rank = len(node_shape(x) or ())
    if "axes" in match.constants and axes[0] not in (-1, rank - 1):
        return "the mean runs over another axis than the last"
    if "shape" in match.constants and len(axes) != 1:
        return "several axes are normalised together"
    if (node_shape(weight) or ()) != (width,) or weight in flow.data:
        return "the scale is no weight of the last axis"
    if not same(out.meta["val"].shape[-1], width) or len(node_shape(out) or ()) != rank:
        return "the scale adds axes"
    if _narrowed(match):
        return "the square is taken in half precision, which the node does in float32"
    return lacking_kernel(x, weight, out)


def _narrowed(match: Match) -> bool:
    """Whether half precision is kept within the norm; the node computes in float32."""
    inner = [n for n in match.inner if opname(n) in ("mean", "rsqrt", "sqrt")]
    return any((held := fake(n)) is not None and held.dtype == torch.float16 for n in inner)


__all__ = ["RmsNorm"]


def is_rms_norm(node: fx.Node) -> bool:
    """Whether a node was written here."""
    return node.args[1:2] == ("RMSNormalization",)
