"""Results that are remembered: layers that are built alike are searched and proved once in a process.

What a search may find depends on what the nodes are, not on whose they are: the operators with their arguments, sizes,
dtypes, the values of constants, who writes to whose storage, and which values enter. All of that is the key; weights
and buffers are in it by their sizes alone, because no proof reads them.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.ir.dataflow import Flow
from gatecc.ir.program import Program
from gatecc.ir.sizes import on_example
from gatecc.passes.causal.parts import Part, is_held
from gatecc.passes.causal.roles import Formula, Operand, Places

_KEPT = 64  # results in a process
_PLAIN = (int, float, complex, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)
_ROLES = ("q", "k", "v", "decay", "beta", "factor")


@dataclass(frozen=True)
class _Result:
    """A part and what was said of it, its nodes by their places among those that the key describes."""

    part: tuple[int, int, tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]] | None
    formula: str | tuple[dict[str, tuple[int, Places, str]], Places, tuple[float, ...], float]


_results: OrderedDict[str, tuple[Any, tuple[Any, ...]]] = OrderedDict()  # with what a key knows by identity, kept alive


class _KeylessError(Exception):
    """Nodes of which not everything can be told by value."""


class Known:
    """What is known of some nodes. ``entering``: what enters them; ``marks``: whatever else the search depends on, by
    node (such as its axis) and of all nodes."""

    def __init__(
        self, program: Program, flow: Flow, nodes: Iterable[fx.Node], entering: Iterable[fx.Node],
        marks: Mapping[fx.Node, object], mark: object,
    ) -> None:  # fmt: skip
        self._nodes = _cone(program, flow, nodes, entering)
        self._index = {node: at for at, node in enumerate(self._nodes)}
        self._targets: dict[int, Any] = {}
        try:
            self._key = _Text(program, flow, self._index, self._targets).key(set(entering), marks, mark)
        except _KeylessError:
            self._key = ""

    def value(self) -> Any:
        """What was kept of equal nodes; None if nothing was."""
        if self._key not in _results:
            return None
        _results.move_to_end(self._key)
        return _results[self._key][0]

    def keep(self, value: Any) -> None:
        """Keep something that holds for all nodes that are equal to these."""
        if not self._key:
            return
        _results[self._key] = value, tuple(self._targets.values())
        while len(_results) > _KEPT:
            _results.popitem(last=False)


class Remembered(Known):
    """The result of a search for a recurrence."""

    def found(self) -> tuple[Part | None, Formula | str] | None:
        """The result of an equal search, on these nodes; None if there was none."""
        result: _Result | None = self.value()
        if result is None:
            return None
        at = self._nodes
        formula = result.formula
        if not isinstance(formula, str):
            roles, out, constant, scale = formula
            given: dict[str, Any] = {
                role: Operand(at[i], places, domain) for role, (i, places, domain) in roles.items()
            }
            formula = Formula(**given, out=out, constant=constant, scale=scale)
        if result.part is None:
            return None, formula
        out, axis, nodes, operands, held = result.part
        return Part(at[out], axis, _all(at, nodes), {at[i]: a for i, a in operands}, _all(at, held)), formula

    def remember(self, part: Part | None, formula: Formula | str) -> None:
        """Keep a result for equal searches."""
        if not self._key or (part is not None and not {part.out, *part.nodes, *part.operands} <= self._index.keys()):
            return
        at = self._index
        kept = None
        if part is not None:
            operands = tuple((at[n], axis) for n, axis in part.operands.items())
            kept = (at[part.out], part.axis, _all(at, part.nodes), operands, _all(at, part.held))
        if isinstance(formula, Formula):
            given = {role: x for role in _ROLES if (x := getattr(formula, role)) is not None}
            roles = {role: (at[x.node], x.places, x.domain) for role, x in given.items()}
            formula_ = (roles, formula.out, formula.constant, formula.scale)
        else:
            formula_ = formula
        self.keep(_Result(kept, formula_))


def forget() -> None:
    """Drop all results."""
    _results.clear()


def _cone(program: Program, flow: Flow, nodes: Iterable[fx.Node], entering: Iterable[fx.Node]) -> list[fx.Node]:
    """The nodes that some depend on, and writers to their storage, up to what enters; in order, but that weights and
    what enters stand before the first that reads them, wherever the graph has them."""
    stops = {node for node in entering if is_held(program, node)}
    seen: set[fx.Node] = set()
    todo = [*nodes, *stops]
    while todo:
        node = todo.pop()
        if node not in seen:
            seen.add(node)
            todo += () if node in stops else (*node.all_input_nodes, *flow.writers.get(flow.base[node], ()))
    leaves = {node for node in seen if node in stops or node.op != "call_function"}
    ordered: dict[fx.Node, None] = {}
    for node in sorted(seen - leaves, key=flow.order.__getitem__):
        ordered |= dict.fromkeys(n for n in node.all_input_nodes if n in leaves) | {node: None}
    ordered |= dict.fromkeys(sorted(leaves, key=flow.order.__getitem__))
    return list(ordered)


class _Text:
    """All that a search may read of nodes, as text."""

    def __init__(self, program: Program, flow: Flow, index: Mapping[fx.Node, int], targets: dict[int, Any]) -> None:
        self.program, self.flow, self.index, self.targets = program, flow, index, targets
        self.names: dict[object, int] = {}  # of storages and weights, by first appearance

    def key(self, entering: set[fx.Node], marks: Mapping[fx.Node, object], mark: object) -> str:
        hashed = hashlib.sha256(repr(mark).encode())
        for node in self.index:
            base = self.names.setdefault(self.flow.base[node], len(self.names))
            what = "enters" if node in entering else self._what(node)
            hashed.update(f"{what} {base} {marks.get(node)} {self._value(node.meta.get('val'))}\n".encode())
        return hashed.hexdigest()

    def _what(self, node: fx.Node) -> str:
        if node.op == "call_function":
            return f"{self._target(node.target)} {self._text(node.args)} {self._text(node.kwargs)}"
        if (constant := self.program.constant(node)) is not None:
            if type(constant) is not torch.Tensor:
                raise _KeylessError
            held = constant.detach().cpu().contiguous()
            digest = hashlib.sha256(held.view(-1).view(torch.uint8).numpy().tobytes()) if held.numel() else None
            return f"constant {node.op} {held.dtype} {tuple(held.shape)} {digest and digest.hexdigest()}"
        weight = self.program.weight(node)
        if weight is not None:
            name = self.names.setdefault(self.program.weight_name(node), len(self.names))
            return f"weight {node.op} {name} {weight.dtype} {tuple(weight.shape)}"
        if node.op != "placeholder":
            raise _KeylessError
        return "input"

    def _target(self, target: Any) -> str:
        if isinstance(target, OpOverload):
            return str(target)
        self.targets[id(target)] = target
        return f"{target!r} {id(target)}"

    def _text(self, item: Any) -> str:
        """A value; the types of numbers are told apart by how they are written."""
        if isinstance(item, fx.Node):
            if item not in self.index:
                raise _KeylessError
            return f"%{self.index[item]}"
        if isinstance(item, list | tuple):
            return f"({','.join(map(self._text, item))})"
        if isinstance(item, dict):
            return f"{{{','.join(f'{name}={self._text(x)}' for name, x in item.items())}}}"
        if isinstance(item, slice):
            return f"slice{self._text((item.start, item.stop, item.step))}"
        if isinstance(item, _PLAIN) or item is Ellipsis:
            return repr(item)
        raise _KeylessError

    def _value(self, held: Any) -> str:
        if isinstance(held, torch.Tensor):
            return f"{held.dtype} {[self._value(size) for size in held.shape]}"
        if isinstance(held, int | torch.SymInt):
            return f"{held}~{on_example(held)}"
        if isinstance(held, list | tuple):
            return str([self._value(x) for x in held])
        return str(type(held))


def _all(at: Any, keys: Sequence[Any]) -> Any:
    return [at[key] for key in keys]
