"""Step rule of operators that carry a state of their own: linear attention, or RNN, GRU and LSTM layers.

They start from the state that they returned in the last step. What differs between them is in their registrations.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.decoder.analysis.axes import Lengths
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules.slots import Slot, recalled, resumed
from gatecc.ir.ops import named, opname
from gatecc.ir.program import META, origin
from gatecc.ir.sizes import described_shape, node_shape, symbols
from gatecc.ops.registry import Carry, StepRule

_ZEROS = frozenset("zeros new_zeros zeros_like".split())


def resume(node: fx.Node, rule: StepRule, slots: list[Slot], lengths: Lengths) -> None:
    """Let a call that runs along the positions start from slots; one along another axis stays as it is.

    Raises DecoderError for a call that has no step.
    """
    x, axis = named(node, rule.operand), rule.axis_of(node)
    shape = node_shape(x) or ()
    if axis is None or not lengths.has(shape[axis]):
        return
    if lengths.axes(x) != [axis % len(shape)] or not lengths.pure(shape[axis]):
        raise refusal(node, f"it runs along a tensor of shape ({described_shape(x)})")
    unfit = rule.unfit(node)
    if unfit is not None:
        raise refusal(node, unfit.reason, do=unfit.do)
    for carry in rule.carries:
        given = named(node, carry.argument)
        start = _start(node, given if carry.item is None else given[carry.item], carry, slots, lengths)
        if carry.item is not None:
            start = [start if i == carry.item else other for i, other in enumerate(given)]
        _give(node, carry.argument, start)


def _start(node: fx.Node, given: Any, carry: Carry, slots: list[Slot], lengths: Lengths) -> Any:
    """A mark for one tensor of the state that ``node`` starts from: at first from what is ``given``."""
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == carry.output:
            raise refusal(user, "it reads the state after the last token, which no token before it may see")
    state = node.meta["val"][carry.output]
    assert isinstance(state, torch.Tensor)
    if not carry.ragged and not any(symbols(size) & lengths.batch for size in state.shape):
        raise refusal(
            node, "the batch is fixed while the model is captured", do="write x.shape[0] in the place of len(x)"
        )
    slots.append(Slot("state", node, value=state, owner=origin(node).owner, output=carry.output, ragged=carry.ragged))
    at = len(slots) - 1
    own = given if isinstance(given, fx.Node) and opname(given) not in _ZEROS else None
    with node.graph.inserting_before(node):
        call = node.graph.call_function
        start = call(recalled, (at,)) if own is None else call(resumed, (own, at))
    start.meta = {"val": state, META: node.meta.get(META)}
    return start


def _give(node: fx.Node, name: str, value: Any) -> None:
    """Set an argument of a call by its name in the schema."""
    assert isinstance(node.target, OpOverload)
    known = node.target._schema.arguments
    at = next(i for i, argument in enumerate(known) if argument.name == name)
    if known[at].kwarg_only:
        node.kwargs = {**node.kwargs, name: value}
        return
    args = [*node.args, *(named(node, a.name) for a in known[len(node.args) : at + 1])]
    node.args = (*args[:at], value, *args[at + 1 :])
    node.kwargs = {key: x for key, x in node.kwargs.items() if key not in {a.name for a in known[: at + 1]}}
