"""Context: what does not change while a text is decoded (an encoder's output above all) is computed once per text.

Nodes that depend on the context go into a program of their own. Steps read its results from the state: for
cross-attention, the projected keys and values of all layers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from gatecc.capture.guards import compile_guards
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan
from gatecc.errors import ArgumentError
from gatecc.ir.sizes import expression, node_shape

_SIZE = re.compile(r"""L\[['"]leaves['"]\]\[(\d+)\]\.size\(\)\[(\d+)\]""")


class Context:
    """The inputs of a decoder that are no tokens, and the program that is run on them once."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.names = [node.name for node in plan.inputs.context]
        self._run = _program(plan) if plan.context else None
        self._guards = [(text, compile_guards([text])) for text in plan.program.guards]

    def __call__(self, batch: int, given: Mapping[str, Any]) -> list[torch.Tensor]:
        """What the steps read. Raises ArgumentError if an input is missing, unknown, or of another shape."""
        if set(given) != set(self.names):
            raise ArgumentError(
                "the context is not what the model was captured with",
                found=", ".join(sorted(given)) or "nothing",
                expected=", ".join(self.names) or "nothing",
                do="pass these inputs by name: prefill(ids, input_ids=...), or init_state(batch, context={...})",
            )
        self._check(batch, given)
        if self._run is None:
            return []
        with torch.no_grad():
            return list(self._run(batch, *(given[name] for name in self.names)))

    def _check(self, batch: int, given: Mapping[str, Any]) -> None:
        """Check the inputs against the guards of the graph; for the tokens, the example's length is taken."""
        leaves: list[torch.Tensor] = []
        for node, example in zip(self.plan.program.placeholders, self.plan.program.example, strict=True):
            x = given.get(node.name)
            sizes = node_shape(node) or ()
            if x is None:
                known = zip(sizes, example.shape, strict=True)
                x = torch.empty([batch if self._is_batch(s) else n for s, n in known], device="meta")
            elif not isinstance(x, torch.Tensor) or x.dim() != len(sizes) or self._other_batch(x, sizes, batch):
                shape = str(tuple(x.shape)) if isinstance(x, torch.Tensor) else type(x).__name__
                raise self._error(node.name, shape, f"{len(sizes)} axes and {batch} samples")
            leaves.append(x)
        for text, holds in self._guards if given else ():
            if not holds(leaves):
                wanted = _SIZE.sub(lambda m: f"{self.plan.program.placeholders[int(m[1])].name}.size({m[2]})", text)
                raise self._error(", ".join(given), str([tuple(x.shape) for x in given.values()]), wanted)

    def _is_batch(self, size: Any) -> bool:
        return expression(size) in self.plan.lengths.batch

    def _other_batch(self, x: torch.Tensor, sizes: Sequence[Any], batch: int) -> bool:
        return any(self._is_batch(s) and n != batch for s, n in zip(sizes, x.shape, strict=True))

    def _error(self, where: str, found: str, expected: str) -> ArgumentError:
        return ArgumentError(
            "an input is not of the shape that was captured",
            where=where,
            found=found,
            expected=expected,
            do="call it as in the example inputs, or derive the decoder again from inputs like these",
        )


def _program(plan: Plan) -> fx.GraphModule:
    """(batch, context inputs) -> what the steps read."""
    writer = GraphWriter(plan)
    sources = Sources(writer)
    numbers = Numbers(writer, sources, sources.add("batch"))
    sources.context = {node: sources.add(node.name, node) for node in plan.inputs.context}
    positions = PositionWriter(sources, numbers, live=plan.dependence.positions)
    writer.graph.output(tuple(positions.whole(node) for node in plan.context))
    return writer.module()
