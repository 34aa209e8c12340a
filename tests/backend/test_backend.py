"""The torch.compile backend: canonical ATen graphs, nothing baked in, the same numbers and as few recompilations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import fx, nn
from torch._ops import OpOverload
from torch.utils.checkpoint import checkpoint

from gatecc import backend
from gatecc.backend.options import Options, inductor_settings
from gatecc.errors import ArgumentError
from gatecc.ir.program import Program
from gatecc.passes.lower import LOWERINGS, Lowering, Outcome


class Block(nn.Module):
    """Attention and feed-forward over x: (B, N, 8), with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.ffn = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.ffn(x)


def inputs(batch: int = 2, length: int = 5) -> torch.Tensor:
    return torch.randn(batch, length, 8, generator=torch.Generator().manual_seed(batch * length))


def step(function: Callable[..., torch.Tensor], model: nn.Module, *args: Any) -> tuple[torch.Tensor, ...]:
    """Output and all gradients, from one random state."""
    model.zero_grad()
    torch.manual_seed(0)
    output = function(*args)
    output.pow(2).mean().backward()
    return (output, *[p.grad for p in model.parameters() if p.grad is not None])


def assert_same(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, atol=tolerance)


def test_it_is_found_by_name() -> None:
    assert "gatecc" in torch._dynamo.list_backends(None)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_the_same_step_at_every_size(mode: str, training: bool) -> None:
    model = Block().train(training)
    compiled = torch.compile(model, backend="gatecc", mode=mode, fullgraph=True)
    for size in ((2, 5), (3, 7), (1, 4)):
        assert_same(step(compiled, model, inputs(*size)), step(model, model, inputs(*size)), 1e-6)


def test_inductor_trains() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU())
    compiled = torch.compile(model, backend="gatecc", options={"compile_threads": 1})
    assert_same(step(compiled, model, inputs()), step(model, model, inputs()), 1e-5)


def test_transformers() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=29, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    model = LlamaForCausalLM(config)
    compiled = torch.compile(model, backend="gatecc", mode="aot_eager")
    ids = torch.randint(0, 29, (2, 5))

    def logits(f: Any) -> Callable[[], torch.Tensor]:
        return lambda: f(ids, use_cache=False).logits

    assert_same(step(logits(compiled), model), step(logits(model), model), 1e-6)


def lowered(function: Any, *args: Any) -> list[fx.GraphModule]:
    """The graphs that the backend makes of a function."""
    graphs: list[fx.GraphModule] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        graphs.append(backend.lower(graph_module, example).graph)
        return graphs[-1].forward

    expected = function(*args)
    found = torch.compile(function, backend=spy)(*args)
    assert torch.allclose(found, expected, atol=1e-6)
    return graphs


class Masked(nn.Module):
    """Fused attention over x: (B, N, 8) whose mask is a tensor; ``offset`` keys after its own are seen by a query."""

    def __init__(self, offset: int = 0) -> None:
        super().__init__()
        self.qkv, self.offset = nn.Linear(8, 24), offset

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        place = torch.arange(x.size(1))
        mask = place[None] <= place[:, None] + self.offset
        return nn.functional.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def test_a_lowered_graph_is_canonical_and_knows_its_owners() -> None:
    (graph,) = lowered(Masked().eval(), inputs())
    calls = [n for n in graph.graph.nodes if n.op not in ("placeholder", "output")]
    assert all(isinstance(n.target, OpOverload) or "getitem" in str(n.target) for n in calls)
    attention = next(n for n in calls if n.target is torch.ops.aten.scaled_dot_product_attention.default)
    assert attention.args[3:] == (None, 0.0, True)
    assert not any("arange" in str(n.target) for n in calls)
    (linear,) = [n for n in calls if n.target is torch.ops.aten.linear.default]
    assert [*linear.meta["nn_module_stack"].values()][-1][1] is nn.Linear


@pytest.mark.parametrize("model", [Block().eval(), Masked(offset=1)])
def test_a_graph_in_which_nothing_is_lowered_goes_on_as_it_came(model: nn.Module) -> None:
    given: list[fx.GraphModule] = []
    made: list[backend.Lowered] = []

    def spy(graph_module: fx.GraphModule, example: Any) -> Callable[..., Any]:
        given.append(graph_module)
        made.append(backend.lower(graph_module, example))
        return made[-1].graph.forward

    torch.compile(model, backend=spy)(inputs())
    assert made[0].graph is given[0]
    assert all(outcome.reason and not outcome.became for outcome in made[0].outcomes)


def test_a_lowering_that_fails_is_left_out(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    class Failing(Lowering):
        def lower(self, program: Program, sites: Any, settings: Any) -> Iterator[Outcome]:
            next(iter(program.calls())).target = torch.ops.aten.relu.default
            raise ValueError("it cannot be")

    Failing.name = "failing"  # afterwards, so that it is not registered for good
    monkeypatch.setitem(LOWERINGS, "failing", Failing)
    (graph,) = lowered(Masked().eval(), inputs())
    assert "failing failed and is left out: it cannot be" in caplog.text
    attention = next(n for n in graph.graph.nodes if "scaled_dot_product" in str(n.target))
    assert attention.args[5] is True


def no_grad_inside(x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        y = x * 2
    return x * y


def in_place(x: torch.Tensor) -> torch.Tensor:
    y = x + 1
    y[0].mul_(2)
    return y.relu_()


def autocast(x: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return (x @ x.mT).float()


@pytest.mark.parametrize("function", [no_grad_inside, in_place, autocast])
@pytest.mark.parametrize("mode", ["eager", "aot_eager"])
def test_regions_and_writes(function: Callable[[torch.Tensor], torch.Tensor], mode: str) -> None:
    compiled = torch.compile(function, backend="gatecc", mode=mode, fullgraph=True)
    found, expected = (inputs().requires_grad_() for _ in range(2))
    outputs = compiled(found), function(expected)
    assert torch.equal(*outputs)
    for output in outputs:
        output.sum().backward()
    assert found.grad is not None
    assert expected.grad is not None
    assert torch.equal(found.grad, expected.grad)


def test_nested_graphs_go_on_as_they_are() -> None:
    ffn = nn.Sequential(nn.Linear(8, 8), nn.GELU())

    def function(x: torch.Tensor) -> torch.Tensor:
        return checkpoint(ffn, x, use_reentrant=False)

    (graph,) = lowered(function, inputs())
    assert any(isinstance(child, fx.GraphModule) for child in graph.children())
    compiled = torch.compile(function, backend="gatecc", mode="aot_eager")
    assert_same(step(compiled, ffn, inputs()), step(function, ffn, inputs()), 1e-6)


def test_weights_are_not_baked_in() -> None:
    """Two layers of one structure and a weight that changes: one graph serves all of them."""
    layers = [nn.Linear(8, 8) for _ in range(2)]
    graphs: list[Any] = []

    def counting(graph_module: fx.GraphModule, example: Any) -> Any:
        graphs.append(graph_module)
        return backend.gatecc(graph_module, example, mode="aot_eager")

    for layer in layers:
        assert torch.equal(torch.compile(layer, backend=counting)(inputs()), layer(inputs()))
    with torch.no_grad():
        layers[0].weight.mul_(2)
    assert torch.equal(torch.compile(layers[0], backend=counting)(inputs()), layers[0](inputs()))
    assert len(graphs) == 1


def test_no_more_recompilations_than_others() -> None:
    counts: list[int] = []
    for inner in ("eager", "gatecc"):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend(inner)
        if inner == "gatecc":
            counter = torch._dynamo.testing.CompileCounterWithBackend(
                lambda g, e: backend.gatecc(g, e, mode="eager")  # pyright: ignore[reportArgumentType]
            )
        compiled = torch.compile(Block().eval(), backend=counter)
        for size in ((2, 5), (3, 7), (4, 9), (1, 9), (1, 1)):
            compiled(inputs(*size))
        counts.append(counter.frame_count)
    assert counts[1] == counts[0]


def test_modes() -> None:
    assert inductor_settings("max-autotune", {"compile_threads": 1})["max_autotune"]
    assert inductor_settings(None, {"compile_threads": 1, "gatecc.freeze": True}) == {"compile_threads": 1}
    with pytest.raises(ArgumentError, match=r"(?s)'fastest'.*reduce-overhead.*aot_eager"):
        inductor_settings("fastest", {})


def test_options() -> None:
    assert Options.of({"gatecc.freeze": True, "compile_threads": 1}) == Options(freeze=True)
    assert Options.of({"gatecc.lowerings": ["causal-mask"]}).lowerings == ("causal-mask",)
    with pytest.raises(ArgumentError, match=r"(?s)gatecc.frozen.*gatecc.freeze"):
        Options.of({"gatecc.frozen": True})
    with pytest.raises(ArgumentError, match=r"(?s)casual-mask.*causal-mask"):
        Options.of({"gatecc.lowerings": ["casual-mask"]})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gatecc.frozen": True}, r"(?s)unknown option.*gatecc.frozen.*gatecc.freeze"),
        ({"gatecc.freeze": "yes"}, r"(?s)gatecc.freeze is a switch.*'yes'.*True or False"),
        ({"gatecc.lowerings": "causal-mask"}, r"(?s)'causal-mask'.*a list of names"),
    ],
)
def test_a_wrong_option_is_said_by_torch_compile(options: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        torch.compile(nn.Linear(8, 8), backend="gatecc", options=options)(torch.randn(2, 8))
