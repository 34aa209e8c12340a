"""Region: the nodes that one call of a module runs, and the values that enter and leave it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import fx

from gatecc.ir.match.facts import Facts
from gatecc.ir.program import fake, origin

_CALL = re.compile(r"@\d+")


@dataclass(frozen=True, eq=False)
class Region:
    """One call of the module ``owner``; ``call`` is its index among the calls of that module."""

    owner: str
    call: int
    nodes: list[fx.Node]

    def enters(self, facts: Facts, *, whole_numbers: bool = False) -> list[fx.Node]:
        """The float values from outside that depend on the inputs, in order; and whole numbers, if they are asked
        for."""
        inside = set(self.nodes)
        found = {n for node in self.nodes for n in facts.inputs[node] if n not in inside and n in facts.data}
        return sorted(n for n in found if _is_float(n) or (whole_numbers and _is_whole(n)))

    def leaves(self, facts: Facts) -> list[fx.Node]:
        """The float values that are read outside, in order."""
        inside = set(self.nodes)
        found = [n for n in self.nodes if n in facts.data and any(user not in inside for user in n.users)]
        return [n for n in found if _is_float(n)]


def regions(facts: Facts, owners: Iterable[str]) -> list[Region]:
    """The calls of the modules with these FQNs, in the order of their first nodes."""
    wanted = set(owners)
    if not wanted:
        return []
    found: dict[tuple[str, str], list[fx.Node]] = {}
    inside: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for node in facts.program.calls():
        entries: dict[str, tuple[str, Any]] = node.meta.get("nn_module_stack", {})
        innermost = (next(reversed(entries), ""), origin(node).owner)  # the keys tell calls apart
        if innermost not in inside:
            paths = {_CALL.sub("", path).removeprefix("m").lstrip("."): key for key, (path, _) in entries.items()}
            inside[innermost] = [
                (fqn, paths.get(facts.program.relative_name(fqn), fqn)) for fqn in _above(node) & wanted
            ]
        for key in inside[innermost]:
            found.setdefault(key, []).append(node)
    calls: dict[str, int] = {}
    result: list[Region] = []
    for (owner, _), nodes in found.items():
        result.append(Region(owner, calls.get(owner, 0), nodes))
        calls[owner] = calls.get(owner, 0) + 1
    return result


def _above(node: fx.Node) -> set[str]:
    """The FQNs of the owner of a node and of all modules above it, whether they were called or entered otherwise."""
    parts = origin(node).owner.split(".")
    return {".".join(parts[:i]) for i in range(len(parts) + 1)}


def _is_float(node: fx.Node) -> bool:
    held = fake(node)
    return held is not None and held.dtype.is_floating_point and held.dim() > 1


def _is_whole(node: fx.Node) -> bool:
    held = fake(node)
    return held is not None and not held.dtype.is_floating_point and held.dim() > 1
