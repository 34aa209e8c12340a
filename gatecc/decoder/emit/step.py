"""write_step: the step program of a plan, a graph of torch calls with explicit state.

Inputs: tokens (B, T), past, and the tuples ``tables`` (position values at the full capacity), ``slots`` (the state),
``starts`` (the first position that the keys of each window hold), ``history`` (values per token, capacity long) and
``context``. Outputs: the logits, and the next value of every slot (None where the slot was written in place).
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from gatecc.decoder.analysis.axes import ALL, NOW
from gatecc.decoder.emit import lower
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.data import DataWriter
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan

_INPUTS = ("tokens", "past", "tables", "slots", "starts", "history", "context")


@dataclass(frozen=True)
class Step:
    """A step program, the tensors that it reads by name, and the position nodes that its tables hold."""

    module: fx.GraphModule
    weights: dict[str, torch.Tensor]
    tables: list[fx.Node]


def write_step(plan: Plan, *, single: bool, live: frozenset[fx.Node] = frozenset()) -> Step:
    """Write one step program. ``single``: for exactly one new token. ``live``: position nodes to evaluate in the step
    rather than to read from tables.
    """
    writer = GraphWriter(plan)
    sources = Sources(writer, plan.context, plan.inputs.history)
    tokens, past, *_ = [sources.add(name) for name in _INPUTS]
    numbers = Numbers(writer, sources, writer.graph.call_method("size", (tokens, 0)))
    new: Any = 1 if single else writer.graph.call_method("size", (tokens, 1))
    numbers.bounds[NOW] = past, new
    numbers.bounds[ALL] = 0, numbers.combine(operator.add, past, new)
    operands = Operands(PositionWriter(sources, numbers, live), tokens)
    slots = SlotWriter(operands, single=single)
    attention = AttentionWriter(operands, single=single)
    data = DataWriter(operands, slots, attention, single=single)
    skipped = attention.folded()
    for node in plan.nodes:
        if node in plan.labels.of and node not in operands.env and node not in skipped:
            operands.env[node] = data.write(node)
    outputs = tuple(slots.next.get(i) for i in range(len(plan.slots)))
    writer.graph.output((operands.env[plan.logits], outputs))
    lower.drop_unread_views(writer.graph)
    return Step(writer.module(), writer.weights, sources.tables)
