"""Small graphs as text, and a rewrite done on one: what comes out, and by how much it differs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from gatecc.ir.edit import Editor
from gatecc.ir.program import Program
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.weights import Effect
from gatecc.pipeline import apply, prepare
from gatecc.scope.family import difference
from gatecc.scope.variant import Variant
from tests.golden.reader import Reader

MLP = """
    @mlp.up.weight  # 16 8
    @mlp.down.weight  # 8 16
    %x = input  # b n 8
    %mask = input  # b n bool
    %up = linear(%x, @mlp.up.weight)  # b n 16 | mlp.up
    %act = gelu(%up)  # b n 16 | mlp
    %down = linear(%act, @mlp.down.weight)  # b n 8 | mlp.down
    %sum = add.Tensor(%x, %down)  # b n 8
    return %sum
"""


def attention(causal: bool = False, mask: str = "None", inputs: str = "") -> str:
    """Attention with four query heads and two key heads of width 2."""
    return f"""
    @att.q.weight  # 8 8
    @att.k.weight  # 4 8
    @att.v.weight  # 4 8
    @att.o.weight  # 8 8
    %x = input  # b n 8
    {inputs}
    %q = linear(%x, @att.q.weight)  # b n 8 | att.q
    %k = linear(%x, @att.k.weight)  # b n 4 | att.k
    %v = linear(%x, @att.v.weight)  # b n 4 | att.v
    %qs = unflatten.int(%q, -1, [4, 2])  # b n 4 2 | att
    %ks = unflatten.int(%k, -1, [2, 2])  # b n 2 2 | att
    %vs = unflatten.int(%v, -1, [2, 2])  # b n 2 2 | att
    %qh = transpose.int(%qs, 1, 2)  # b 4 n 2 | att
    %kh = transpose.int(%ks, 1, 2)  # b 2 n 2 | att
    %vh = transpose.int(%vs, 1, 2)  # b 2 n 2 | att
    %kr = repeat_interleave.self_int(%kh, 2, 1)  # b 4 n 2 | att
    %vr = repeat_interleave.self_int(%vh, 2, 1)  # b 4 n 2 | att
    %heads = scaled_dot_product_attention(%qh, %kr, %vr, {mask}, 0.0, {causal})  # b 4 n 2 | att
    %back = transpose.int(%heads, 1, 2)  # b n 4 2 | att
    %merged = flatten.using_ints(%back, 2, 3)  # b n 8 | att
    %out = linear(%merged, @att.o.weight)  # b n 8 | att.o
    return %out
"""


@dataclass
class Done:
    """``values`` are those of the graph's own nodes before the rewrite, by name; ``error`` is of the outputs."""

    program: Program
    edits: list[Editor]
    before: tuple[Tensor, ...]
    values: dict[str, Tensor]

    @property
    def steps(self) -> list[Effect]:
        return [step for edit in self.edits for step in edit.weights]

    def run(self) -> tuple[Tensor, ...]:
        """The outputs now."""
        with torch.no_grad():
            return Variant(self.program, ())(self.program.module, self.program.example)

    @property
    def error(self) -> float:
        return max(difference(a, b) for a, b in zip(self.before, self.run(), strict=True))


def done(text: str, *rewrites: Rewrite) -> Done:
    """Read a graph, canonicalize it, do rewrites, install their weights."""
    program = Reader(text).program
    prepared = prepare(program)
    with torch.no_grad():
        before = Variant(program, ())(program.module, program.example)
        values = _values(program)
    edits = [edit for of_one in apply(prepared, rewrites) for edit in of_one]
    result = Done(program, edits, before, values)
    for step in result.steps:
        step.apply(program.module)
    return result


def _values(program: Program) -> dict[str, Tensor]:
    """Every value of a graph on its example inputs."""
    values: dict[fx.Node, Tensor] = dict(zip(program.placeholders, program.example, strict=True))
    for node in program.graph.nodes:
        if node.op == "get_attr":
            held = program.weight(node)
            assert held is not None
            values[node] = held
        elif node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            values[node] = node.target(*args, **kwargs)
    return {node.name: value for node, value in values.items()}
