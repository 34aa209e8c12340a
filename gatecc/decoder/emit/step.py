"""write_step: the step of a plan as a Program, a graph of ATen operators with explicit state.

Its placeholders are flat: each is a tensor or a whole number (`Program.placeholders` lists the tensors alone).

    tokens         (B, T) token ids, as the model takes them; T is 1 in a step for a single token
    past           the number of tokens before them
    slot_i         the state: what `rules.slots.Slot` i describes. Keys and values are written in place (aten.copy_)
    start_i        the first position that the keys of window i hold
    history        (B, capacity) the values per token, named as the model's inputs are
    carried        (B, T, C) what the step before left, for the new tokens
    context        what does not change while a text is decoded
    table_i        a position value at the full capacity, of which the step reads rows

Its outputs are the logits, and the next value of every slot: None where the slot was written in place.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.utils._pytree import tree_structure

from gatecc.decoder.analysis.axes import ALL, NOW
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.data import DataWriter
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan
from gatecc.ir.program import Program


@dataclass(frozen=True, eq=False)
class Step:
    """One step as a program, which may be rewritten before it is lowered.

    ``single``: it is for exactly one new token. ``sources``: its placeholders. ``stands_for``: the data node of the
    captured graph that a node was written for. Values (``meta["val"]``) are recorded on demand: see `emit.record`.
    """

    plan: Plan
    single: bool
    program: Program
    sources: Sources
    stands_for: dict[fx.Node, fx.Node]

    @property
    def tables(self) -> list[fx.Node]:
        """The position nodes of the captured graph that it reads from tables."""
        return list(self.sources.tables)


def write_step(plan: Plan, *, single: bool, live: frozenset[fx.Node] = frozenset()) -> Step:
    """Write one step. ``live``: the position nodes to evaluate in the step rather than to read from tables."""
    writer = GraphWriter(plan)
    sources = Sources(writer)
    tokens, past = sources.add("tokens", plan.inputs.tokens), sources.add("past")
    sources.slots = [sources.add(f"slot_{i}", slot.node) for i, slot in enumerate(plan.slots)]
    sources.starts = [sources.add(f"start_{i}") for i in range(len(plan.windows))]
    sources.history = {node: sources.add(node.name, node) for node in plan.inputs.history}
    sources.context = {node: sources.add(node.name, node) for node in plan.context}
    sources.carried = {node: sources.add(node.name, node) for node in plan.inputs.carried}
    numbers = Numbers(writer, sources, writer.size(tokens, 0))
    new: Any = 1 if single else writer.size(tokens, 1)
    numbers.bounds[NOW] = past, new
    numbers.bounds[ALL] = 0, numbers.combine(operator.add, past, new)
    operands = Operands(PositionWriter(sources, numbers, live), tokens)
    operands.env |= sources.carried
    slots = SlotWriter(operands, single=single)
    data = DataWriter(operands, slots, AttentionWriter(operands, single=single))
    stands_for: dict[fx.Node, fx.Node] = {}
    for node in plan.nodes:
        if node in plan.labels.of and node not in operands.env:
            made = operands.env[node] = data.write(node)
            stands_for.setdefault(made, node)
    outputs = tuple(slots.next.get(i) for i in range(len(plan.slots)))
    writer.graph.output((operands.env[plan.logits], *outputs))
    writer.graph.eliminate_dead_code()
    return Step(plan, single, _program(plan, writer), sources, stands_for)


def _program(plan: Plan, writer: GraphWriter) -> Program:
    """The written graph as a program of the captured module."""
    captured = plan.program
    spec = tree_structure((0, *[0] * len(plan.slots)))
    return Program(captured.module, writer.module(), captured.fqn, [], spec, constants=captured.constants)
