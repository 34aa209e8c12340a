"""Calls of custom autograd functions in a graph that is being printed, in the place of their operators."""

from __future__ import annotations

import operator
from typing import cast

from torch import fx

from gatecc.errors import CaptureError
from gatecc.ir.boundary import Slot
from gatecc.ir.functions import FunctionCall
from gatecc.ir.program import Program


class PrintedCalls:
    """The calls of one program."""

    def __init__(self, program: Program) -> None:
        self.program = program
        here = set(program.graph.nodes)
        self.of_output: dict[fx.Node, FunctionCall] = {}
        self.skipped: set[fx.Node] = set()
        for call in program.functions:
            self.skipped |= call.inside
            self.of_output |= {node: call for node in call.outputs if node is not None and node in here and node.users}
        if self.of_output and program.autocast is not None and not program.exempt.isdisjoint(here):
            raise CaptureError(
                "a custom autograd function runs under autocast, beside a region that switches it off",
                where=program.fqn or type(program.module).__name__,
                found=", ".join({call.cls.__name__: 0 for call in self.of_output.values()}),
                do="call it outside of the caller's autocast",
            )
        for call in dict.fromkeys(self.of_output.values()):
            self._check(call, here)

    def _check(self, call: FunctionCall, here: set[fx.Node]) -> None:
        """Raise CaptureError if an edit went into the operators of the function, which would not run."""
        known = {*call.inside, *call.sources, *call.entries}
        wrong = next((n for n in call.inside & here if not known.issuperset(n.all_input_nodes)), None)
        for node in call.inside & here if wrong is None else ():
            if node not in call.outputs and not call.inside.issuperset(u for u in node.users if u not in call.outputs):
                wrong = node
        if wrong is not None or not here.issuperset(n for n in call.entries if n is not None) or None in call.entries:
            raise CaptureError(
                "a custom autograd function is in the way",
                where=self.program.fqn or type(self.program.module).__name__,
                found=f"{call.cls.__name__}: the rewrite changes a value inside of it, "
                "for which its own backward would be wrong",
                do="select a value outside of the function, or write it with operators whose gradients torch knows",
            )

    def printed(self, node: fx.Node, graph: fx.Graph, copied: dict[fx.Node, fx.Node]) -> bool:
        """Whether a node is printed already: as a part of a call, which is put where its first output is read."""
        call = self.of_output.get(node)
        if call is None or node in copied:
            return node in self.skipped
        given = [copied[cast("fx.Node", entry)] for entry in call.entries]
        result = graph.call_function(call.function(), tuple(given))
        for place, slot in enumerate(call.results):
            output = call.outputs[slot.number] if isinstance(slot, Slot) else None
            if output is not None:
                copied[output] = graph.call_function(operator.getitem, (result, place)) if call.several else result
        return True
