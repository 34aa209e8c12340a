"""RNN sites: RNN, GRU and LSTM layers, which torch keeps as one operator over the whole sequence."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.match.registry import matcher
from gatecc.ir.ops import opname
from gatecc.ir.program import shape
from gatecc.ir.site import RNN, Value

_CELLS = {"gru": "gru", "lstm": "lstm", "rnn_tanh": "rnn", "rnn_relu": "rnn"}


@matcher
def match_rnn(facts: Facts) -> Iterator[RNN]:
    """One site an operator on padded sequences, in execution order."""
    for node in facts.program.calls():
        if opname(node) in _CELLS and str(node.target).endswith(".input"):
            yield _site(node, facts)


def _site(node: fx.Node, facts: Facts) -> RNN:
    """x, state, weights, has_biases, num_layers, dropout, train, bidirectional, batch_first"""
    given: tuple[Any, ...] = node.args
    x, state = given[0], given[1]
    axes = "nc" if len(shape(x)) == 2 else "bnc" if given[8] else "nbc"
    results: dict[int, fx.Node] = {}
    for user in node.users:
        if user.target is operator.getitem and isinstance(user.args[1], int):
            results.setdefault(user.args[1], user)
    values = {"in": Value(x, axes)} | ({"out": Value(results[0], axes)} if 0 in results else {})
    read = [n for n in given[2] if isinstance(n, fx.Node) and facts.program.weight(n) is not None]
    return RNN(
        **facts.place("rnn", node),
        values=values,
        core=node,
        cell=_CELLS[opname(node)],
        layers=int(given[4]),
        bidirectional=bool(given[7]),
        states=tuple(state) if isinstance(state, list | tuple) else (state,),
        parameters=tuple(str(facts.program.path(n)) for n in read),
        last=tuple(results.get(i) for i in (1, 2)),
    )
