"""write_closed: the step for any number of new tokens as a function of tensors alone, which a file can hold.

Its inputs are the tokens, the values per token, the slots and the context; its outputs the logits and the next value
of every slot. Nothing is written in place: keys and values come as long as there are tokens so far, and leave with the
new ones behind them. Position values are constants of the program, or computed in it; how many tokens there are follows
from the sizes of the inputs.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_structure

from gatecc.decoder.analysis.axes import ALL, NOW, Span
from gatecc.decoder.emit.attention import AttentionWriter
from gatecc.decoder.emit.data import DataWriter
from gatecc.decoder.emit.numbers import Numbers
from gatecc.decoder.emit.operands import Operands
from gatecc.decoder.emit.positions import PositionWriter
from gatecc.decoder.emit.sized import Sizes, record_closed
from gatecc.decoder.emit.slots import SlotWriter
from gatecc.decoder.emit.sources import Sources
from gatecc.decoder.emit.tables import Tables
from gatecc.decoder.emit.writer import GraphWriter
from gatecc.decoder.plan import Plan
from gatecc.decoder.rules.slots import Slot
from gatecc.ir.program import Program, origin
from gatecc.ir.sizes import expression, node_shape, symbols

_aten = torch.ops.aten
MASK = "attention_mask"
_BEFORE, _NEW = 6, 5  # sizes of the example


@dataclass(frozen=True, eq=False)
class Held:
    """One tensor that is carried from call to call: ``source`` is its input. It is what ``slot`` describes; without
    one, the values so far of ``given``, an input per token."""

    source: fx.Node
    slot: Slot | None = None
    given: fx.Node | None = None

    @property
    def grows(self) -> int | None:
        """The axis along which it gets longer by the new tokens, None if it does not."""
        if self.slot is None:
            return 1
        return self.slot.axis if self.slot.kind == "keys" else None


@dataclass(frozen=True, eq=False)
class Closed:
    """One step as a program of tensors.

    ``mask``: the input over all tokens so far and the new ones, if there is one; ``counted``: the model takes none.
    ``ragged``: attention counts the tokens of each row by it, so that prompts are padded on the right. ``given``: the
    inputs with a value per token (the mask among them), and those of the captured program that they are. ``held``: in
    the order of the outputs behind the logits. ``capacity``: the most tokens that its constants reach to, None for any
    number.
    """

    plan: Plan
    program: Program
    tokens: fx.Node
    mask: fx.Node | None
    counted: bool
    ragged: bool
    given: dict[fx.Node, fx.Node]
    held: list[Held]
    context: dict[fx.Node, fx.Node]
    capacity: int | None


def write_closed(plan: Plan, live: frozenset[fx.Node], capacity: int, *, counted: bool = False) -> Closed:
    """Write the step. ``live``: the position nodes that no constant can hold. ``capacity``: how far constants reach.
    ``counted``: attention that hides nothing but later tokens and padding is to count the tokens of each row by a mask,
    so that prompts are padded on the right.
    """
    live |= {n for n in plan.dependence.positions if len(plan.lengths.axes(n)) > 1 or _mixed(n, plan)}
    while True:
        step, differ = _written(plan, live, capacity, counted)
        if not differ:
            _record(step)
            return step
        live |= differ


def _written(plan: Plan, live: frozenset[fx.Node], capacity: int, ragged: bool) -> tuple[Closed, frozenset[fx.Node]]:
    """The step, and the position nodes whose values differ between samples, so that constants were no use."""
    writer = GraphWriter(plan)
    sources = _Sources(writer, capacity)
    tokens = sources.add("tokens", plan.inputs.tokens)
    sources.history = {node: sources.add(node.name, node) for node in plan.inputs.history}
    sources.mask = next((made for node, made in sources.history.items() if node.name.endswith(MASK)), None)
    sources.slots = [sources.add(f"slot_{i}", slot.node) for i, slot in enumerate(plan.slots)]
    sources.context = {node: sources.add(node.name, node) for node in plan.context}
    ragged = ragged and any(found.scale is not None for found in plan.attentions.values())
    counted = _counts(plan, sources, ragged)
    numbers = Numbers(writer, sources, writer.size(tokens, 0))
    new = writer.size(tokens, 1)
    past = _past(plan, sources, new, numbers)
    numbers.bounds[NOW] = past, new
    numbers.bounds[ALL] = 0, numbers.combine(operator.add, past, new)
    operands = Operands(PositionWriter(sources, numbers, live), tokens)
    slots = _Slots(operands, single=False)
    data = _Data(operands, slots, _Attention(operands, single=False), sources.mask if counted or ragged else None)
    for node in plan.nodes:
        if node in plan.labels.of and node not in operands.env:
            operands.env[node] = data.write(node)
    held = [Held(x, slot) for x, slot in zip(sources.slots, plan.slots, strict=True)]
    held += [Held(made, given=sources.history[node]) for node, made in sources.earlier.items()]
    after = [slots.next[i] for i in range(len(plan.slots))]
    after += [sources.whole(node, None) for node in sources.earlier]
    writer.graph.output((operands.env[plan.logits], *after))
    writer.graph.eliminate_dead_code()
    mask = sources.mask
    if counted and mask is not None and not mask.users:
        writer.graph.erase_node(mask)
        mask = None
    spec = tree_structure((0, *[0] * len(after)))
    tables = {name: x for name, x in sources.constants.items() if writer.graph.find_nodes(op="get_attr", target=name)}
    constants = {**plan.program.constants, **tables}
    captured = plan.program
    program = Program(captured.module, writer.module(), captured.fqn, [], spec, constants=constants)
    given = {made: node for node, made in sources.history.items()}
    reach = capacity if tables else None
    step = Closed(plan, program, tokens, mask, counted, ragged, given, held, sources.context, reach)
    return step, frozenset(sources.differ)


def _mixed(node: fx.Node, plan: Plan) -> bool:
    """Whether a value differs between samples, or may: one of a batch that is folded into another axis."""
    batch = plan.lengths.batch
    shape = node_shape(node) or ()
    return any(symbols(size) & batch for size in shape[1:]) or (
        bool(shape) and bool(symbols(shape[0]) & batch) and expression(shape[0]) not in batch
    )


def _counts(plan: Plan, sources: _Sources, ragged: bool) -> bool:
    """Give the program a mask if nothing else tells how many tokens there were, or attention is to count them. Whether
    it did."""
    if sources.mask is not None or (any(slot.kind == "keys" for slot in plan.slots) and not ragged):
        return False
    sources.mask = sources.add(MASK)
    return True


def _past(plan: Plan, sources: _Sources, new: fx.Node, numbers: Numbers) -> Any:
    """The number of tokens before the new ones; by the mask where there is one, for buffers may hold room for more."""
    if sources.mask is not None:
        return numbers.combine(operator.sub, sources.writer.size(sources.mask, 1), new)
    for slot, held in zip(plan.slots, sources.slots, strict=True):
        if slot.kind == "keys":
            return sources.writer.size(held, slot.axis)
    raise AssertionError("a step without keys has a mask")


class _Sources(Sources):
    """Position values are constants, of which one sample is held; values per token come as the call gives them."""

    def __init__(self, writer: GraphWriter, capacity: int) -> None:
        super().__init__(writer)
        self.capacity = capacity
        self.constants: dict[str, torch.Tensor] = {}
        self.mask: fx.Node | None = None
        self.earlier: dict[fx.Node, fx.Node] = {}
        self.differ: set[fx.Node] = set()

    def whole(self, node: fx.Node, length: Any) -> fx.Node:
        """All values: given as a whole, or those of before with the new ones behind them."""
        given = self.history[node]
        if given is self.mask:
            return given
        if node not in self.earlier:
            self.earlier[node] = self.add(f"past_{node.name}", node)
        parts = [self.earlier[node], given]
        return self.writer.once(("joined", node), lambda: self.writer.call(_aten.cat.default, (parts, 1)))

    def new(self, node: fx.Node) -> fx.Node | None:
        given = self.history[node]
        return None if given is self.mask else given

    def table(self, node: fx.Node) -> fx.Node:
        if node not in self.tables:
            value = Tables(self.writer.plan, [node]).run(2, self.capacity)[0]
            if self._per_sample(node):
                if not torch.equal(value[0], value[1]):
                    self.differ.add(node)
                value = value[:1].clone()
            self.tables[node] = self._constant(value)
        return self.tables[node]

    def _constant(self, value: torch.Tensor) -> fx.Node:
        """Layers that each make their own table of the same numbers share one."""
        name = next((name for name, known in self.constants.items() if _same(known, value)), None)
        if name is None:
            name = f"gatecc_table_{len(self.constants)}"
            self.constants[name] = value.detach()  # of a parameter, too, which torch.onnx takes by other names
        return self.writer.once(("table", name), lambda: self.writer.constant(name, self.constants[name]))

    def spread(self, part: fx.Node, node: fx.Node, batch: Any) -> fx.Node:
        if not self._per_sample(node):
            return part
        return self.writer.call(_aten.expand.default, (part, [batch, *[-1] * (len(node_shape(node) or ()) - 1)]))

    def _per_sample(self, node: fx.Node) -> bool:
        return bool(symbols((node_shape(node) or (1,))[0]) & self.writer.plan.lengths.batch)


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one, other)


class _Slots(SlotWriter):
    """Keys are no buffers: the new ones go behind the old ones in a tensor of its own."""

    def _keep(self, held: Any, x: Any, axis: int, span: Span) -> Any:
        index = self.sources.slots.index(held)
        self.next[index] = whole = self.writer.call(_aten.cat.default, ([held, x], axis))
        if span.window is None:
            return whole
        return self.writer.narrow(whole, axis, *self.numbers.bound(span))


class _Data(DataWriter):
    """Attention that is known through and through is one operator, which keeps keys and values as well."""

    def __init__(self, operands: Operands, slots: SlotWriter, attention: AttentionWriter, mask: fx.Node | None) -> None:
        super().__init__(operands, slots, attention)
        self.mask = mask

    def _data(self, node: fx.Node) -> Any:
        if node.target is _aten.where.self and origin(node).skips:
            return self._skipped(node)
        found = self.plan.attentions.get(node)
        counted = frozenset(n for n, made in self.slots.sources.history.items() if made is self.mask)
        hides = self.mask is not None and found is not None and found.hiding == counted
        if found is None or found.scale is None or not (found.plain or hides):
            return super()._data(node)  # padding may be by another input than the mask that it is counted by
        marks = (found.keys, found.values)
        indices = [int(str(mark.args[-1])) for mark in marks]
        new = [self.operands.read(node, mark.all_input_nodes[0]) for mark in marks]
        past = [self.slots.sources.slots[index] for index in indices]
        options = {
            "scale": found.scale,
            "window": self.plan.slots[indices[0]].span.window or 0,
            "softcap": found.soft_cap,
        }
        args = (self.operands.read(node, found.query), *new, *past, self.mask)
        made = self.writer.call(torch.ops.gatecc.cached_attention.default, args, options)
        for output, index in enumerate(indices, 1):
            self.slots.next[index] = self.writer.call(operator.getitem, (made, output))
        return self.writer.call(operator.getitem, (made, 0))

    def _skipped(self, node: fx.Node) -> fx.Node:
        """where(condition, value, other), of which a file computes the value if the condition holds somewhere."""
        condition, value, other = (self.operands.read(node, x) for x in node.args)
        some = self.writer.once(("any", condition), lambda: self.writer.call(_aten.any.default, (condition,)))
        value = self.writer.call(torch.ops.gatecc.only_if.default, (value, other, some, node.name))
        return self.writer.call(_aten.where.self, (condition, value, other))


class _Attention(AttentionWriter):
    """A mask that is proved to be causal, or a window, is written as such."""

    def write(self, node: fx.Node) -> fx.Node:
        found = self.plan.fused.get(node)
        if found is None or not found.plain:
            return super().write(node)
        span = self.plan.slots[int(str(found.keys.args[1]))].span
        args = [self.operands.read(node, x) for x in (*node.args[:3], *node.args[4:5])]
        args.insert(3, self._causal(span, node.meta["val"].device))
        kept = {k: v for k, v in node.kwargs.items() if k not in ("attn_mask", "is_causal")}
        options = {k: self.operands.read(node, v) for k, v in kept.items()}
        return self.writer.call(_aten.scaled_dot_product_attention.default, tuple(args), options)


def _record(step: Closed) -> None:
    """Record the values of all nodes, and an example of the sizes that symbols stand for: zeros, ones for the mask."""
    record_closed(step.program, lambda symbol: _inputs(step, Sizes(step.plan.lengths, symbol)), ones={step.mask})


def _inputs(step: Closed, sizes: Sizes) -> Iterator[tuple[fx.Node, torch.Tensor]]:
    """The fake values of the placeholders."""
    tokens = step.plan.inputs.tokens.meta["val"]
    before, now = sizes.symbol("past", _BEFORE), sizes.symbol("new", _NEW)
    yield step.tokens, sizes.like(tokens, 1, now)
    if step.mask is not None:
        if step.counted:
            alone = all(held.grows is None for held in step.held)
            total = sizes.symbol("total", _BEFORE + _NEW) if alone else before + now
            yield step.mask, sizes.like(tokens, 1, total).long()
        else:
            yield step.mask, sizes.like(step.given[step.mask].meta["val"], 1, before + now)
    for node, captured in step.given.items():
        if node is not step.mask:
            yield node, sizes.like(captured.meta["val"], 1, now)
    for held in step.held:
        if held.slot is None:
            assert held.given is not None
            yield held.source, sizes.like(step.given[held.given].meta["val"], 1, before)
            continue
        size: Any = {"keys": before, "scan": 1}.get(held.slot.kind, held.slot.count)
        yield held.source, sizes.like(held.slot.like, None if held.slot.kind == "state" else held.slot.axis, size)
    for captured, node in step.context.items():
        yield node, sizes.like(captured.meta["val"], None, 0)
