"""The Model site: the program as a whole, its inputs and outputs by name. A submodule's program has none."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from gatecc.ir.axes import Axes
from gatecc.ir.match.joins import JoinedFacts
from gatecc.ir.match.registry import matcher
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Model, Value

_COUNTS = {1: "b", 2: "bn", 3: "bnc", 4: "bhnm"}  # what the axes of indices and masks count, by their number


@matcher
def match_model(facts: JoinedFacts) -> Iterator[Model]:
    """One site, if the program is that of a whole model and yields a tensor. An output hides an input of its name."""
    outputs = named_outputs(facts)
    if facts.program.fqn or not outputs:
        return
    values = {name: outer_value(facts, node) for name, node in (named_inputs(facts.program) | outputs).items()}
    first = next(iter(outputs.values()))
    values.setdefault("out", values[next(iter(outputs))])
    yield Model(owner="", line=origin(first).line, values=values)


def named_inputs(program: Program) -> dict[str, fx.Node]:
    """The tensors that the model is given, by parameter and place in it: ``input_ids``, ``embeddings_0``; by the names
    of their nodes where several stand at one place (``*args``).
    """
    names = ["_".join(map(str, path)) for path in program.paths]
    pairs = zip(names, program.placeholders, strict=True)
    return {name if names.count(name) == 1 else node.name: node for name, node in pairs if fake(node) is not None}


def named_outputs(facts: JoinedFacts) -> dict[str, fx.Node]:
    """The computed tensors that the model returns, by key and place: ``logits``, ``hidden_states_0``; ``out`` for one
    tensor alone, ``out0``, ``out1``, ... for a tuple."""
    names = _ends(facts.program.out_spec, "")
    pairs = zip(names, facts.program.outputs, strict=True)
    computed = {name: leaf for name, leaf in pairs if isinstance(leaf, fx.Node) and leaf in facts.data}
    return {name: leaf for name, leaf in computed.items() if fake(leaf) is not None}


def outer_value(facts: JoinedFacts, node: fx.Node) -> Value:
    """An input or output with its axes: indices and masks by their rank, streams by where their features are."""
    held = fake(node)
    rank = 0 if held is None else held.dim()
    if rank == 0 or held is None:
        return Value(node, "")
    if rank == 1 or not held.is_floating_point():
        return Value(node, _COUNTS.get(rank, Axes.of_features(rank, None)))
    return facts.value(node)


def _ends(spec: Any, path: str) -> list[str]:
    """The names of the leaves of a structure, in order."""
    if spec.is_leaf():
        return [path or "out"]
    children: list[Any] = spec.children()
    keys = spec.context if isinstance(spec.context, list | tuple) and len(spec.context) == len(children) else ()
    keys = getattr(spec.context, "_fields", keys)  # of a named tuple
    names = [str(key) for key in keys] or [str(i) if path else f"out{i}" for i in range(len(children))]
    within = [f"{path}_{name}" if path else name for name in names]
    return [end for name, child in zip(within, children, strict=True) for end in _ends(child, name)]
