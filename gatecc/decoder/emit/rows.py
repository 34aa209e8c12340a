"""Rows: what a step need not compute for the samples whose tokens left (gatecc.passes.exit.tokens), as calls.

What a slot remembers of a token is computed for all samples: keys and values are, of the hidden state at the exit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, fx

from gatecc.decoder.emit.record import record_sizes
from gatecc.decoder.emit.step import Step
from gatecc.decoder.rules import slots as marks
from gatecc.ir.program import META, origin
from gatecc.ir.skipped import Skipped, skipped
from gatecc.ops import paths
from gatecc.ops.some_rows import Rows, count_of, on_rows


def skips(step: Step) -> dict[fx.Node, Skipped]:
    """What the marked nodes of a step skip."""
    if not any(origin(node).skips for node in step.plan.nodes if META in node.meta):
        return {}
    record_sizes(step)
    kept = {node for node, captured in step.stands_for.items() if captured.target in marks.MARKS}
    return {one.node: one for one in skipped(step.program, kept, step.plan.lengths.batch)}


class Body:
    """A part of a lowered step that is called for some samples: (rows, condition, other, *given) -> other, with its
    result in these rows. ``axes``: along which axis of each of ``given`` there are samples; ``within``: bodies by name
    that it calls itself."""

    def __init__(self, graph: fx.Graph, axes: Sequence[int | None], within: Mapping[str, Any]) -> None:
        code = graph.python_code("self")
        names: dict[str, Any] = dict(code.globals)
        exec(compile(code.src, "<gatecc step, a body>", "exec"), names)
        self.text, self.axes = code.src, list(axes)
        self._within = SimpleNamespace(**within)
        self._forward: Callable[..., Tensor] = names["forward"]

    def run(self, rows: Rows, condition: Tensor, other: Tensor, *given: Any) -> Tensor:
        """The result for all samples."""
        if paths.is_watched():
            samples = condition.size(0)
            read = [x for x in given if isinstance(x, Tensor) and x.is_leaf and x.requires_grad]
            paths.note(paths.Taken("block", (count_of(rows, samples),), samples, read))
        if paths.is_whole():
            return torch.where(condition, self._body(*given), other)
        return on_rows(self._body, self.axes, rows, condition, other, given)

    def _body(self, *given: Any) -> Tensor:
        return self._forward(self._within, *given)
