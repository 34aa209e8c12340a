"""GraphLowering: one kind of thing that a graph spells out, and the ONNX node that computes it.

A lowering looks at every place that might be meant, proves that the node computes the same there, and only then edits.
It answers with an `Outcome` for each place: what stands there now, or why it was left alone. Nothing depends on names
of models or modules.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import mutates
from gatecc.ir.outcome import Outcome
from gatecc.ir.pattern import Match
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Site

Target = Literal["ort", "portable", "opset27"]
GRAPH_LOWERINGS: dict[str, type[GraphLowering]] = {}
WITH_KERNELS = (torch.float32, torch.float16)  # dtypes for which ONNX Runtime's CPU has the fused nodes


@dataclass(eq=False)
class Subject:
    """What is lowered: a canonical program with its sites, for a target.

    ``context`` is the largest length that the model is made for, None if nobody knows; ``opset`` that of the standard
    nodes. ``shared`` holds what several places have in common: tables, sizes.
    """

    program: Program
    sites: Sequence[Site]
    target: Target
    opset: int
    context: int | None = None
    shared: dict[Any, Any] = field(default_factory=dict[Any, Any])
    notes: list[str] = field(default_factory=list[str])

    def flow(self) -> Flow:
        """The flow of the program as it is now."""
        return Flow(self.program)


class GraphLowering(ABC):
    """Register a subclass by giving it a ``name``.

    ``after``: names of lowerings that must have run before. ``targets`` and ``since``: for which targets it is, and
    from which opset on.
    """

    name: ClassVar[str]
    after: ClassVar[tuple[str, ...]] = ()
    targets: ClassVar[tuple[Target, ...]] = ("ort", "portable", "opset27")
    since: ClassVar[int] = 18

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "name" in vars(cls):
            GRAPH_LOWERINGS[cls.name] = cls

    @abstractmethod
    def lower(self, subject: Subject) -> Iterator[Outcome]:
        """Edit the program in place; one outcome for each place that was looked at."""

    def done(self, node: fx.Node, found: str, became: str, reason: str = "") -> Outcome:
        """The outcome of a place that was lowered; ``reason`` is what proved it."""
        place = origin(node)
        return Outcome(self.name, place.owner, place.line, found, became, reason)

    def left(self, node: fx.Node, found: str, reason: str) -> Outcome:
        """The outcome of a place that stays."""
        place = origin(node)
        return Outcome(self.name, place.owner, place.line, found, reason=reason)


def lacking_kernel(*nodes: fx.Node) -> str:
    """Why ONNX Runtime has no fused node for values of this dtype; "" if it has one."""
    dtypes = {held.dtype for n in nodes if (held := fake(n)) is not None}
    if len(dtypes) > 1:
        return f"values of several dtypes meet: {', '.join(sorted(map(str, dtypes)))}"
    other = [str(d) for d in dtypes if d not in WITH_KERNELS]
    return f"ONNX Runtime has no kernel of it for {other[0]}" if other else ""


def written_in_place(match: Match, flow: Flow) -> str:
    """Why a match is no value that a node could yield: something of it is written to; "" if nothing is."""
    if any(mutates(n) or flow.writers.get(flow.base[n]) for n in (*match.inner, *match.nodes.values())):
        return "a part of it is written to in place"
    return ""
