"""The Step site: one step of a model that runs again and again, as diffusion and decoding do.

It is told by an input that says where the step stands: a number that goes into sines and cosines. One per sample is a
time (the timestep of diffusion); one per token is a position (the rotary embedding of a decode step). Names of inputs
say nothing.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.model import named_inputs, named_outputs, outer_value
from gatecc.ir.match.registry import matcher
from gatecc.ir.ops import CASTS, CONTRACTIONS, VIEWS, opname
from gatecc.ir.program import fake, origin
from gatecc.ir.site import Step, Value
from gatecc.ir.sizes import node_shape, same

_SCALING = VIEWS | CASTS | CONTRACTIONS | frozenset("add sub mul div neg cat stack".split())
_BUDGET = 48  # nodes between an input and its sines


@matcher
def match_step(facts: JoinedFacts) -> Iterator[Step]:
    """One site, if an input of a whole model is a time or a position."""
    outputs = named_outputs(facts)
    if facts.program.fqn or not outputs:
        return
    values: dict[str, Value] = {}
    for node in named_inputs(facts.program).values():
        if _is_turned(facts, node):
            name = "position" if _is_per_token(facts, node) else "time"
            values.setdefault(name, _value(facts, node, name))
    if values:
        first = next(iter(outputs.values()))
        yield Step(owner="", line=origin(first).line, values=values | {"out": outer_value(facts, first)})


def _is_turned(facts: JoinedFacts, node: fx.Node) -> bool:
    """Whether sines are taken of an input that is only scaled, by constants, on the way."""
    held = fake(node)
    if held is None or held.dim() > 2 or held.is_complex():
        return False
    seen, stack = {node}, [node]
    while stack and len(seen) < _BUDGET:
        for user in stack.pop().users:
            if opname(user) in ("sin", "cos"):
                return True
            mine = {n for n in facts.inputs[user] if n in facts.data}
            if opname(user) in _SCALING and user not in facts.projections and mine <= seen and user not in seen:
                seen.add(user)
                stack.append(user)
    return False


def _is_per_token(facts: JoinedFacts, node: fx.Node) -> bool:
    """Whether the last axis of an input counts tokens: it has two, or the length of another input's second axis."""
    shape = node_shape(node) or ()
    if len(shape) == 2:
        return not same(shape[1], 1)
    others = [node_shape(n) or () for n in named_inputs(facts.program).values() if n is not node]
    return len(shape) == 1 and any(len(s) > 1 and same(s[1], shape[0]) and not same(s[0], shape[0]) for s in others)


def _value(facts: JoinedFacts, node: fx.Node, name: str) -> Value:
    rank = len(node_shape(node) or ())
    return Value(node, ("bn"[2 - rank :] if name == "position" else "bc"[:rank]))
