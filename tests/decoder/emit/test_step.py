"""A step is a Program of ATen operators, and what runs is the same step, lowered."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.symbolic_shapes import optimization_hint

import gatecc
from gatecc.decoder import Decoder
from gatecc.decoder.emit.lower import lower
from gatecc.decoder.emit.step import write_step
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program, origin
from gatecc.ir.sizes import symbols
from gatecc.ir.verify import Before, Suspect, verify
from gatecc.pipeline.cost import cost
from tests.decoder.mixing import Convolution, D, LinearAttention, Mixed, RunningMean, V
from tests.zoo import SPECS

aten = torch.ops.aten


class Started(nn.Module):
    """Recurrent layers that start from a learned state."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.start = nn.LSTM(D, D, batch_first=True), nn.Parameter(torch.randn(1, 1, D))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        state = self.start.expand(-1, x.shape[0], -1).contiguous()
        return self.rnn(x, (state, state))[0]


class Written(nn.Module):
    """A tensor is written to between two reshapes of a copy of it, which must not see that."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        y = x + 1
        copied = y.unflatten(-1, (2, -1)).transpose(2, 3).reshape(x.shape)
        y.mul_(10)
        return copied.unflatten(-1, (4, -1)).flatten(2) + y


MIXERS = {
    "conv": lambda: Convolution(cut=True),
    "mean": RunningMean,
    "linear attention": lambda: LinearAttention("gated delta"),
    "lstm": Started,
    "written": Written,
}
ZOO = ("hf/llama-sdpa", "hand/sdpa_sliding", "hf/mpt-eager")  # heads that share keys; a window; no table for ALiBi


@cache
def decoder(name: str) -> Decoder:
    """The decoder of one model, which several tests look at."""
    if name in ZOO:
        case = SPECS[name].build()
        return gatecc.decoder(case.model, case.inputs)
    return gatecc.decoder(Mixed(MIXERS[name]()).eval(), (torch.randint(V, (2, 12)),))


def inputs(program: Program) -> list[Any]:
    """Copies of the example, with whole numbers where the placeholders hold them."""
    tensors = iter(program.example)
    held = [node.meta["val"] for node in program.graph.find_nodes(op="placeholder")]
    return [next(tensors).clone() if isinstance(x, Tensor) else optimization_hint(x) for x in held]


class Shapes(fx.Interpreter):
    """Runs a graph and compares every tensor with what is recorded of it, at the sizes of the example."""

    def run_node(self, n: fx.Node) -> Any:
        result, recorded = super().run_node(n), n.meta.get("val")
        if isinstance(result, Tensor):
            assert isinstance(recorded, Tensor), n.name
            hints = [optimization_hint(size) for size in recorded.shape]
            assert (list(result.shape), result.dtype) == (hints, recorded.dtype), n.name
        return result


@pytest.mark.parametrize("name", [*ZOO, *MIXERS])
@pytest.mark.parametrize("single", [True, False], ids=["one token", "several"])
def test_the_lowered_step_computes_what_the_program_does(name: str, single: bool) -> None:
    made = decoder(name)
    program = made.program(single=single)
    one, other = inputs(program), inputs(program)
    with torch.no_grad():
        expected = Shapes(program.graph_module).run(*one)
        got = made.lowered(single=single)(*other)
    assert [x is None for x in got] == [x is None for x in expected]
    recorded = [node.meta["val"] for node in program.graph.nodes if node.op != "output"]
    sizes = [size for x in recorded if isinstance(x, Tensor) for size in x.shape]
    assert not any(symbols(size) & made.plan.lengths.length for size in sizes), "the captured length is another"
    for x, y in zip([*got, *other], [*expected, *one], strict=True):  # also the slots that are written in place
        if isinstance(x, Tensor):
            torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_sites_of_a_step_are_those_of_the_model() -> None:
    made = decoder("hf/llama-sdpa")
    of_model = [(site.kind, site.key) for site in find_sites(made.plan.program).sites]  # marks stand in its blocks
    assert ("attention", "model.layers.1.self_attn#0") in of_model
    for single in (True, False):
        found = [(site.kind, site.key) for site in find_sites(made.program(single=single)).sites]
        assert [key for kind, key in found if kind == "block"] == ["model.layers.0#0", "model.layers.1#0"]
        assert [(kind, key) for kind, key in found if kind != "block"] == of_model


def test_a_step_is_well_formed_and_knows_where_it_comes_from() -> None:
    made = decoder("hf/llama-sdpa")
    for single in (True, False):
        program = made.program(single=single)
        verify(program, Before.of(program), Suspect("step", [], set(program.graph.nodes)))
        cores = program.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default)
        assert [origin(n).owner for n in cores] == ["model.layers.0.self_attn", "model.layers.1.self_attn"]
        assert [origin(n) for n in cores] == [origin(n) for n in made.plan.fused]


def test_the_cost_of_a_token_is_read_from_its_step() -> None:
    program = decoder("hf/llama-sdpa").program()
    config: Any = program.module.get_submodule("model").config
    batch, keys = 2, 16
    weights = sum(m.weight.numel() for m in program.module.modules() if isinstance(m, nn.Linear))
    scores = config.num_hidden_layers * config.num_attention_heads * keys * config.head_dim
    assert cost(program).flops == 2 * batch * (weights + 2 * scores)


@pytest.mark.parametrize("single", [True, False])
def test_a_program_may_be_rewritten_before_it_is_lowered(single: bool) -> None:
    made = decoder("hf/llama-sdpa")
    step = write_step(made.plan, single=single)
    for node in step.program.graph.find_nodes(op="call_function", target=aten.silu.default):
        node.target = aten.relu.default
    example = made.program(single=single)
    with torch.no_grad():
        plain = made.lowered(single=single)(*inputs(example))[0]
        expected = fx.Interpreter(step.program.graph_module).run(*inputs(example))[0]
        got = lower(step)(*inputs(example))[0]
    assert not torch.allclose(plain, expected, rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
