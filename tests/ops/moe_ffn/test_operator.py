"""The operator's schema, fake kernel, autograd and options, against its definition slot by slot in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ops import registry
from gatecc.ops.moe_ffn import moe_ffn
from gatecc.ops.moe_ffn.activations import names
from tests.ops.moe_ffn.cases import BY_HAND, by_hand, leaves, operands, to, wanted

SHAPES: dict[str, dict[str, Any]] = {
    "halves": {},
    "interleaved": {"layout": "interleaved", "o": 3},
    "plain": {"layout": "plain", "biased": True, "activation": "gelu"},
    "gpt-oss": {"layout": "interleaved", "activation": "swiglu", "biased": True},
    "slots": {"combine": "slots", "biased": True, "o": 9},
    "one slot": {"k": 1, "combine": "slots"},
    "more slots than experts": {"E": 2, "k": 5},
    "lora": {"layout": "plain", "activation": "identity", "d": 8, "width": 2, "E": 5, "k": 3, "o": 4},
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("name", SHAPES)
def test_the_definition(name: str) -> None:
    given = operands(**SHAPES[name])
    torch.testing.assert_close(moe_ffn(**given), by_hand(**given))


@pytest.mark.parametrize("activation", BY_HAND)
@pytest.mark.parametrize("layout", ["halves", "plain"])
def test_activations(activation: str, layout: str) -> None:
    given = operands(activation=activation, layout=layout)
    torch.testing.assert_close(moe_ffn(**given), by_hand(**given), rtol=1e-6, atol=1e-9)


def test_every_activation_is_tested() -> None:
    assert set(names()) == {name for name in [*BY_HAND, "swiglu"] if "=" not in name}


@pytest.mark.parametrize("name", SHAPES)
def test_gradients_are_those_of_the_definition(name: str) -> None:
    given = leaves(operands(**SHAPES[name]))
    out = moe_ffn(**given)
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, wanted(given), grad)
    torch.testing.assert_close(found, torch.autograd.grad(by_hand(**given), wanted(given), grad))


@pytest.mark.parametrize("activation", [*BY_HAND, "swiglu"])
def test_gradients_of_activations(activation: str) -> None:
    given = leaves(operands(activation=activation))
    found, expected = (torch.autograd.grad(f(**given).square().sum(), wanted(given)) for f in (moe_ffn, by_hand))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("frozen", ["x", "weights", "gate_up", "down", "gate_up_bias", "down_bias"])
def test_a_gradient_less(frozen: str) -> None:
    given = leaves(operands(biased=True))
    given[frozen].requires_grad_(False)
    found, expected = (torch.autograd.grad(f(**given).square().sum(), wanted(given)) for f in (moe_ffn, by_hand))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", ["halves", "slots", "gpt-oss"])
def test_every_other_derivative(name: str) -> None:
    shape: dict[str, Any] = {**SHAPES[name], "T": 2, "d": 2, "width": 2, "E": 2}
    shape.pop("o", None)
    given = leaves(operands(**shape))
    fixed = {n: v for n, v in given.items() if not (isinstance(v, Tensor) and v.requires_grad)}
    names = [n for n in given if n not in fixed]

    def call(*tensors: Tensor) -> Tensor:
        varied: dict[str, Any] = dict(zip(names, tensors, strict=True))
        return moe_ffn(**fixed, **varied)

    assert torch.autograd.gradcheck(call, wanted(given), check_forward_ad=True, check_batched_grad=True, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, wanted(given), fast_mode=True)


def test_vmap_over_models() -> None:
    several = [operands() for _ in range(3)]
    stacked = {n: torch.stack([given[n] for given in several]) for n in several[0] if several[0][n] is not None}
    found = torch.func.vmap(lambda given: moe_ffn(**given))(stacked)
    torch.testing.assert_close(found, torch.stack([by_hand(**given) for given in several]))


@pytest.mark.parametrize("name", ["halves", "slots", "plain"])
def test_registration(name: str) -> None:
    given = leaves(to(operands(**SHAPES[name]), torch.float32))
    tensors = [v for v in given.values() if isinstance(v, Tensor) or v is None]
    options = {n: v for n, v in given.items() if isinstance(v, str)}
    torch.library.opcheck(torch.ops.gatecc.moe_ffn.default, tuple(tensors), options)


@pytest.mark.parametrize("combine", ["sum", "slots"])
def test_no_tokens(combine: str) -> None:
    given = leaves(operands(T=0, o=3, combine=combine))
    out = moe_ffn(**given)
    assert out.shape == ((0, 3) if combine == "sum" else (0, 2, 3))
    for grad in torch.autograd.grad(out.sum(), wanted(given)):
        assert not grad.any()


def test_empty_slots_and_experts() -> None:
    given = leaves(operands(T=5, E=6))
    given["indices"] = torch.tensor([[6, 6], [2, 6], [6, 2], [2, 2], [6, 4]])
    with torch.no_grad():
        given["weights"][given["indices"] == 6] = float("nan")
    out = moe_ffn(**given)
    assert not out[0].any()
    torch.testing.assert_close(out, by_hand(**given))
    grads = dict(zip(["x", "weights", "gate_up", "down"], torch.autograd.grad(out.sum(), wanted(given)), strict=True))
    assert not grads["x"][0].any()
    assert not grads["weights"][given["indices"] == 6].any()
    for name in ("gate_up", "down"):
        assert [e for e in range(6) if grads[name][e].any()] == [2, 4]


def test_nothing_but_empty_slots() -> None:
    given = leaves(operands(T=3))
    given["indices"] = torch.full((3, 2), 4)
    out = moe_ffn(**given)
    assert not out.any()
    assert not any(grad.any() for grad in torch.autograd.grad(out.sum(), wanted(given)))


def test_a_weight_that_is_no_number_is_seen_in_its_token_alone() -> None:
    given = operands(E=3)
    given["indices"] = given["indices"].clamp_max(2)
    given["weights"][2, 1] = float("nan")
    assert moe_ffn(**given).isnan().all(1).tolist() == [t == 2 for t in range(7)]


def test_weights_of_any_strides() -> None:
    given = operands()
    turned = {**given, **{n: given[n].mT.contiguous().mT for n in ("gate_up", "down")}}
    assert not turned["gate_up"].is_contiguous()
    turned["x"] = given["x"].T.contiguous().T
    torch.testing.assert_close(moe_ffn(**turned), by_hand(**given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_lower_precisions(dtype: torch.dtype) -> None:
    given = leaves(to(operands(T=40, d=32, width=24, biased=True), dtype))
    given["weights"] = given["weights"].detach().float().requires_grad_()
    truth = leaves(to(given, torch.float64))
    out, expected = moe_ffn(**given), by_hand(**truth)
    assert out.dtype == dtype
    grads, right = (
        torch.autograd.grad(o.double().square().sum(), wanted(g)) for o, g in ((out, given), (expected, truth))
    )
    for found, want in zip([out, *grads], [expected, *right], strict=True):
        assert (found.double() - want).abs().max() <= 4 * torch.finfo(dtype).eps * want.abs().max()


def test_slots_are_summed_in_float32() -> None:
    """2048 + 1 + 1 is 2048 in bfloat16 and in float16, summed in steps."""
    given = to(operands(T=1, d=1, width=1, E=3, k=3, layout="plain", activation="identity"), torch.float16)
    given |= {"x": torch.ones(1, 1).half(), "down": torch.ones(3, 1, 1).half(), "indices": torch.arange(3)[None]}
    given |= {"gate_up": torch.tensor([2048.0, 1, 1]).half().view(3, 1, 1), "weights": torch.ones(1, 3)}
    assert moe_ffn(**given).item() == 2050


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_run_twice(dtype: torch.dtype) -> None:
    given = leaves(to(operands(T=50, d=16, width=24, k=3), dtype))
    runs = [[out := moe_ffn(**given), *torch.autograd.grad(out.float().sum(), wanted(given))] for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_autocast_casts_the_experts_but_not_the_weights() -> None:
    given = leaves(to(operands(), torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        out = moe_ffn(**given)
    low = to(given, torch.bfloat16) | {"weights": given["weights"]}
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, moe_ffn(**low))
    assert {g.dtype for g in torch.autograd.grad(out.float().sum(), wanted(given))} == {torch.float32}


class Layer(nn.Module):
    """Routed by the two largest of x itself."""

    def __init__(self) -> None:
        super().__init__()
        given = to(operands(E=6, biased=True), torch.float32)
        for name in ("gate_up", "down", "gate_up_bias", "down_bias"):
            self.register_parameter(name, nn.Parameter(given[name]))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 6)"""
        rows = x.flatten(0, -2)
        values, indices = rows.topk(2)
        experts = (self.get_parameter(n) for n in ("gate_up", "down", "gate_up_bias", "down_bias"))
        return torch.ops.gatecc.moe_ffn(rows, values.softmax(-1), indices, *experts, activation="gelu").view_as(x)


def test_export_with_symbolic_sizes() -> None:
    layer, x = Layer(), torch.randn(2, 5, 6)
    B, N = torch.export.Dim("B"), torch.export.Dim("N")
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: B, 1: N},)).run_decompositions({})
    assert "gatecc.moe_ffn.default" in str(program.graph)
    other = torch.randn(3, 11, 6)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_compile_without_a_graph_break() -> None:
    layer, sizes = Layer(), (7, 3, 11, 5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch._dynamo.utils.counters.clear()
    for n in sizes:
        x = torch.randn(2, n, 6, requires_grad=True)
        leaves = [x, *layer.parameters()]
        found, expected = (torch.autograd.grad(f(x).square().sum(), leaves) for f in (compiled, layer))
        torch.testing.assert_close(found, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


def test_what_it_costs() -> None:
    given = operands(T=3, d=8, width=16, E=4, k=2)
    entry: Any = registry.find(torch.ops.gatecc.moe_ffn.default)
    products = 3 * 2 * (2 * 8 * 32 + 2 * 16 * 8)
    shapes = [v.shape for v in given.values() if isinstance(v, Tensor)]
    assert entry.flops(*shapes) == products
    size = 8 * (3 * 8 + 2 * 3 * 2 + 4 * (8 * 32 + 16 * 8) + 3 * 8)
    tensors = [v for v in given.values() if isinstance(v, Tensor)]
    assert entry.bytes(*tensors) == size
    one = [t[:1] for t in tensors[:3]]
    one[2] = torch.tensor([[1, 1]])  # both slots read the one expert
    assert entry.bytes(*one, *tensors[3:]) == 8 * (8 + 2 * 2 + (8 * 32 + 16 * 8) + 8)
    unknown = [t.to("meta") for t in (*one, *tensors[3:])]  # two slots may read two
    assert entry.bytes(*unknown) == 8 * (8 + 2 * 2 + 2 * (8 * 32 + 16 * 8) + 8)


def test_flops_of_training_are_counted() -> None:
    given = leaves(operands(T=3, d=8, width=16, E=4, k=2))
    with FlopCounterMode(display=False) as counter:
        moe_ffn(**given).sum().backward()
    assert counter.get_total_flops() == 3 * 3 * 2 * (2 * 8 * 32 + 2 * 16 * 8)


def test_inspection_counts_the_operator() -> None:
    totals = gatecc.inspect(Layer().eval(), (torch.randn(2, 5, 6),)).totals
    assert totals.flops_before == 10 * 2 * 2 * (6 * 10 + 5 * 6)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "axes": ({"x": torch.zeros(1, 7, 6).double()}, "x of moe_ffn has 2 axes"),
    "slots": ({"weights": torch.zeros(7, 3).double()}, "each token has a weight and an index"),
    "tokens": ({"x": torch.zeros(6, 6).double()}, "each token has a weight and an index"),
    "width": ({"x": torch.zeros(7, 5).double()}, "gate_up does not fit x"),
    "down": ({"down": torch.zeros(4, 6, 10).double()}, "down does not fit gate_up in the layout 'halves'"),
    "experts": ({"down": torch.zeros(3, 6, 5).double()}, "down does not fit gate_up"),
    "bias": ({"down_bias": torch.zeros(4, 5).double()}, "down_bias does not fit"),
    "dtype": ({"down": torch.zeros(4, 6, 5)}, "one dtype"),
    "indices": ({"indices": torch.zeros(7, 2, dtype=torch.int32)}, "indices are integers"),
    "weights": ({"weights": torch.zeros(7, 2, dtype=torch.int64)}, "indices are integers"),
    "layout": ({"layout": "columns"}, "no such layout"),
    "combine": ({"combine": "mean"}, "no such way to combine"),
    "activation": ({"activation": "swish"}, "no such activation"),
    "option": ({"activation": "elu(beta=1)"}, "no such option"),
    "number": ({"activation": "elu(alpha=x)"}, "no such option"),
    "ungated": ({"layout": "plain", "down": torch.zeros(4, 6, 10).double(), "activation": "swiglu"}, "of gate and up"),
    "too large": ({"indices": torch.full((7, 2), 5)}, "no expert"),
    "negative": ({"indices": torch.full((7, 2), -1)}, "no expert"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    change, message = REFUSED[name]
    with pytest.raises(ArgumentError, match=message):
        moe_ffn(**{**operands(), **change})
