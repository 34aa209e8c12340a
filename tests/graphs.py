"""Graphs in tests: small ones as text or from a function, run node by node, and a rewrite done on one.

What comes out of a rewrite, and by how much it differs, is found by running; no pass touches `run` and `record`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from gatecc.capture import capture
from gatecc.ir.edit import Editor
from gatecc.ir.ops import mutates
from gatecc.ir.program import Program
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.weights import Effect
from gatecc.pipeline import apply, canonical_form, prepare
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


# --- running ----------------------------------------------------------------------------------------------------------


class _Function(nn.Module):
    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(*inputs)


def program_of(function: Callable[..., Tensor], *inputs: Tensor, dynamic: Literal["auto", "none"] = "auto") -> Program:
    """A function as a canonical program."""
    program = capture(_Function(function), inputs, dynamic=dynamic)
    canonical_form(program)
    return program


def run(program: Program, *inputs: Tensor) -> tuple[Any, ...]:
    """The flat outputs of a program on its flat inputs (the example's without any)."""
    env: dict[fx.Node, Any] = {}
    for _ in _steps(program, inputs, env):
        pass
    return tuple(env[out] if isinstance(out, fx.Node) else out for out in program.outputs)


@torch.no_grad()
def record(program: Program) -> dict[fx.Node, Any]:
    """The value of every node on the example inputs, as it was when it was last read (it may be written to later)."""
    env: dict[fx.Node, Any] = {}
    seen: dict[fx.Node, Any] = {}
    for node in _steps(program, (), env):
        for known in (node, *([] if mutates(node) else node.all_input_nodes)):
            held = env.get(known)
            seen[known] = held.detach().clone() if isinstance(held, Tensor) else held
    return seen


def _steps(program: Program, inputs: tuple[Tensor, ...], env: dict[fx.Node, Any]) -> Iterator[fx.Node]:
    """Run a program node by node, into ``env``."""
    leaves = iter(inputs or program.example)
    for node in program.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(leaves)
        elif node.op == "get_attr":
            env[node] = _held(program, node)
        elif node.op == "call_function":
            assert callable(node.target)
            args, kwargs = fx.map_arg((node.args, node.kwargs), env.__getitem__)
            env[node] = node.target(*args, **kwargs)
        yield node


def _held(program: Program, node: fx.Node) -> Any:
    name = str(node.target)
    if name in program.constants:
        return program.constants[name]
    body = getattr(program.graph_module, name, None)
    return body if isinstance(body, fx.GraphModule) else program.weight(node)


# --- a rewrite --------------------------------------------------------------------------------------------------------


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
    values = {node.name: value for node, value in record(program).items()}
    edits = [edit for of_one in apply(prepared, rewrites) for edit in of_one]
    result = Done(program, edits, before, values)
    for step in result.steps:
        step.apply(program.module)
    return result
