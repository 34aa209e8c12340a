"""What is left to Inductor, which fuses it: norms, gated units and rotary embeddings."""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from gatecc.ir.ops import opname
from gatecc.ir.program import Program

_NORMS = frozenset("layer_norm rms_norm _fused_rms_norm native_layer_norm rsqrt".split())  # a spelled-out one's last
_GATES = frozenset("silu gelu relu sigmoid tanh".split())


def fused_anyway(program: Program) -> Iterator[tuple[str, list[fx.Node]]]:
    """By kind, the nodes that show one, kinds without any left out."""
    found: dict[str, list[fx.Node]] = {}
    for node in program.calls():
        if kind := _kind(node):
            found.setdefault(kind, []).append(node)
    yield from found.items()


def _kind(node: fx.Node) -> str:
    name = opname(node)
    if name in _NORMS:
        return "a norm, with the sum before it" if any(map(_adds, _near(node))) else "a norm"
    if name == "mul" and len(node.all_input_nodes) == 2 and any(opname(n) in _GATES for n in node.all_input_nodes):
        return "a gated unit"
    return "a rotary embedding" if name == "cat" and _is_half_turn(node) else ""


def _near(node: fx.Node) -> list[fx.Node]:
    """What a norm reads; of a spelled-out one, behind its mean."""
    found, todo = [node], [node]
    for _ in range(6):
        todo = [n for later in todo for n in later.all_input_nodes[:1]]
        found += todo
    return found[1:]


def _adds(node: fx.Node) -> bool:
    return opname(node) == "add" and len(node.all_input_nodes) == 2


def _is_half_turn(node: fx.Node) -> bool:
    """(-b, a) of halves."""
    parts = node.args[0]
    first = parts[0] if isinstance(parts, list | tuple) and len(parts) == 2 else None
    return isinstance(first, fx.Node) and opname(first) == "neg"
