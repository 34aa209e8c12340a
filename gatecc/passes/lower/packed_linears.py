"""packed-linears: products of one value with several weights become one product, where that is measured to be faster.

On a CPU that is so for narrow ones: a float32 product with fewer than 16 outputs takes about as long as one with twice
as many (gates per head, decays, routers, the inner factors of adapters). Their weights are concatenated in the graph,
at every call: that costs next to nothing, learns, and is never stale. Wide ones (q, k and v; gate and up) gain nothing
there (0.75 to 1.05 times the speed at 1 to 1024 rows and 256 to 4096 outputs). On an accelerator each product is a
launch, so all are packed, under ``gatecc.freeze``, where the concatenation is done once (gatecc.backend.freeze).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import optimization_hint

from gatecc.ir.ops import mutates, opname
from gatecc.ir.program import Program, fake, origin
from gatecc.ir.site import Site
from gatecc.passes.lower.insert import insert
from gatecc.passes.lower.lowering import Lowering, Outcome, Settings

NARROW = 16  # outputs: one tile of a float32 product
ROWS = 32  # below, the calls cost more than what they compute


class PackedLinears(Lowering):
    """linear(x, A), linear(x, B) -> split(linear(x, cat(A, B)))."""

    name = "packed-linears"
    left = "16 outputs and more, or 16 bits, on a CPU; on an accelerator without `gatecc.freeze`"
    after = ("adapters",)

    def lower(self, program: Program, sites: Sequence[Site], settings: Settings) -> Iterator[Outcome]:
        for group in _groups(program):
            packed, reason = _chosen(group, settings)
            place = origin(group.linears[0])
            found = f"products of one value with {', '.join(map(str, group.widths))} outputs"
            if not packed:
                yield Outcome(self.name, place.owner, place.line, found, reason=reason)
                continue
            chosen = group.of(packed)
            _pack(program, self.name, chosen)
            became = f"one product with {sum(chosen.widths)} outputs"
            proof = "the weights are concatenated in the graph"
            yield Outcome(self.name, place.owner, place.line, found, became, proof, reason)


@dataclass(frozen=True)
class _Group:
    """Linears that read one value, in the order of the graph, and their numbers of outputs."""

    linears: list[fx.Node]
    widths: list[int]

    def of(self, places: Sequence[int]) -> _Group:
        """Some of them."""
        return _Group([self.linears[i] for i in places], [self.widths[i] for i in places])


def _groups(program: Program) -> Iterator[_Group]:
    found: dict[tuple[object, ...], list[fx.Node]] = {}
    written = 0  # a value that something was written into meanwhile is another one
    for node in program.calls():
        written += mutates(node)
        if opname(node) != "linear" or not isinstance(node.args[0], fx.Node):
            continue
        weights = [a for a in node.args[1:] if a is not None]
        x, first = fake(node.args[0]), fake(weights[0]) if isinstance(weights[0], fx.Node) else None
        if x is None or first is None or not all(isinstance(w, fx.Node) and program.is_parameter(w) for w in weights):
            continue
        if not any(isinstance(size, torch.SymInt) for size in first.shape):
            found.setdefault((node.args[0], len(weights), first.dtype, written), []).append(node)
    for linears in found.values():
        if len(linears) > 1 and len({node.all_input_nodes[1] for node in linears}) == len(linears):
            yield _Group(linears, [int(_weight(node).shape[0]) for node in linears])


def _weight(linear: fx.Node) -> torch.Tensor:
    return linear.all_input_nodes[1].meta["val"]


def _chosen(group: _Group, settings: Settings) -> tuple[list[int], str]:
    """The places of those to pack with what it gains, or none with the reason."""
    x, y = fake(group.linears[0].all_input_nodes[0]), fake(group.linears[0])
    assert x is not None
    assert y is not None
    if x.device.type != "cpu":
        everything = list(range(len(group.linears)))
        if settings.freeze and not settings.training:
            return everything, f"{len(everything) - 1} launches less, an estimate"
        return [], "weights may be packed under options={'gatecc.freeze': True}, without gradients"
    narrow = [i for i, width in enumerate(group.widths) if width < NARROW]
    total = sum(group.widths[i] for i in narrow)
    if y.dtype != torch.float32 or len(narrow) < 2 or total < NARROW:
        return [], f"nothing is gained on a CPU unless several have fewer than {NARROW} outputs each, in float32"
    rows = prod(optimization_hint(size, fallback=ROWS) for size in x.shape[:-1])
    if rows < ROWS:
        return [], f"{rows} rows: nothing is gained on a CPU below {ROWS}"
    return narrow, "about half of the time of these products (measured: 1.7 to 2.4 times as fast on AVX-512)"


def _pack(program: Program, lowering: str, group: _Group) -> None:
    x, *operands = group.linears[0].all_input_nodes
    biased, count = len(operands) > 1, len(group.linears)
    weights = [node.all_input_nodes[1] for node in group.linears]
    biases = [node.all_input_nodes[2] for node in group.linears] if biased else []

    def packed(x: torch.Tensor, *given: torch.Tensor) -> tuple[torch.Tensor, ...]:
        bias = torch.cat(given[count:]) if biased else None
        y = torch.nn.functional.linear(x, torch.cat(given[:count]), bias)
        # Apart and contiguous as they were: what reads them may view them in any way, and write into them.
        return tuple(p.clone(memory_format=torch.contiguous_format) for p in y.split(group.widths, -1))

    first = group.linears[0]
    for held in (*weights, *biases):
        if held.op == "get_attr":
            first.prepend(held)
    for node, part in zip(group.linears, insert(program, lowering, first, packed, x, *weights, *biases), strict=True):
        node.replace_all_uses_with(part)
        program.graph.erase_node(node)
