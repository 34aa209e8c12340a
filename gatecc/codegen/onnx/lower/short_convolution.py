"""short-convolution: a causal convolution along tokens, each channel by itself, is one node that carries its state.

``CausalConvWithState`` is in the standard since opset 27, and in ONNX Runtime. Its kernel there takes a seventh of the
time at one token, and three times as long at hundreds, so that for ONNX Runtime it is written where a state is carried.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from gatecc.codegen.onnx.lower.lowering import GraphLowering, Subject, Target
from gatecc.codegen.onnx.lower.write import Writer
from gatecc.codegen.onnx.opset import CAUSAL_CONVOLUTION
from gatecc.ir.dataflow import Flow
from gatecc.ir.match.short_convolution import CausalConvolution, causal_convolution, silu_of, width
from gatecc.ir.ops import mutates, named
from gatecc.ir.outcome import Outcome

_OPERATORS: dict[Target, str] = {"ort": "com.microsoft::CausalConvWithState", "opset27": CAUSAL_CONVOLUTION}


class ShortConvolution(GraphLowering):
    """conv1d of x padded on the left, with silu behind it -> CausalConvWithState."""

    name = "short-convolution"
    targets = tuple(_OPERATORS)

    def lower(self, subject: Subject) -> Iterator[Outcome]:
        flow = subject.flow()
        for node in list(subject.program.calls()):
            found = causal_convolution(node)
            if (
                found is None
                or node.meta["val"].dtype != torch.float32
                or (subject.target == "ort" and found.state is None)
            ):
                continue
            if any(mutates(n) or flow.writes_to(n) for n in (found.x, found.conv, found.out)):
                yield self.left(node, "a causal convolution", "a part of it is written to in place")
                continue
            yield self._write(subject, found, flow)

    def _write(self, subject: Subject, found: CausalConvolution, flow: Flow) -> Outcome:
        silu = silu_of(found.out, flow)
        out = found.out if silu is None else silu
        writer = Writer(subject.program, out, self.name)
        weight, bias = (named(found.conv, name) for name in ("weight", "bias"))
        y, after = writer.several(
            _OPERATORS[subject.target],
            [found.x, weight, bias, found.state],
            {"activation": "none" if silu is None else "silu"},
            [tuple(out.meta["val"].shape), (*found.x.meta["val"].shape[:2], width(found.conv) - 1)],
            out.meta["val"].dtype,
        )
        out.replace_all_uses_with(y)
        for node in found.states:
            node.replace_all_uses_with(after)
        return self.done(found.conv, "a causal convolution", "CausalConvWithState" + " with SiLU" * (silu is not None))


__all__ = ["ShortConvolution"]
