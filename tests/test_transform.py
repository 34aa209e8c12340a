"""transform as a user calls it: forms of input, bad input, scopes, and the model that it must not touch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc import MLP, Attention, Gate, GateSpec, Linear, Residual
from gatecc.errors import (
    ArgumentError,
    EmptySelectionError,
    ExampleInputsError,
    GateccError,
    SiteRefusedError,
    UnknownRecipeError,
    UnsupportedModelError,
)
from gatecc.scope.state import scopes


class Attend(nn.Module):
    def __init__(self, width: int = 16, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (p(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for p in (self.q, self.k, self.v))
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.o(o.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attend(width)
        self.up = nn.Linear(width, 32)
        self.down = nn.Linear(32, width)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + self.attention(self.norm(x), mask)
        return x + self.down(F.gelu(self.up(x)))


class Model(nn.Module):
    def __init__(self, depth: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block() for _ in range(depth)])
        self.head = nn.Linear(16, 5)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            x = block(x, mask)
        return self.head(x)


RECIPE = "gated-attention"


@pytest.fixture
def model() -> nn.Module:
    return Model().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 6, 16)


@pytest.mark.parametrize(
    "form", [lambda x: (x,), lambda x: {"x": x}, lambda x: ((x,), {}), lambda x: ((), {"x": x}), lambda x: (x, None)]
)
def test_forms_of_example_inputs(model: nn.Module, x: Tensor, form: Callable[[Tensor], Any]) -> None:
    gated = gatecc.transform(model, RECIPE, form(x))
    assert torch.allclose(gated(x), model(x), atol=1e-6)
    assert [s.owner for s in gatecc.inspect(model, form(x)).sites if s.kind == "attention"] == [
        "blocks.0.attention",
        "blocks.1.attention",
    ]


def test_the_model_is_untouched(model: nn.Module, x: Tensor) -> None:
    names, before = set(model.state_dict()), model(x)
    gatecc.transform(model, RECIPE, (x,))
    assert set(model.state_dict()) == names
    assert torch.equal(model(x), before)
    assert not list(scopes(model))


@pytest.mark.parametrize("inplace", [False, True])
def test_every_module_keeps_its_mode(model: nn.Module, x: Tensor, inplace: bool) -> None:
    model.train().get_submodule("blocks.1").eval()
    before = {name: m.training for name, m in model.named_modules()}
    gated = gatecc.transform(model, RECIPE, (x,), inplace=inplace)
    assert {name: m.training for name, m in gated.named_modules() if name in before} == before
    assert [gated.get_submodule(f"blocks.{i}.attention.gate").training for i in (0, 1)] == [True, False]


@pytest.mark.parametrize("inplace", [False, True])
def test_runs_of_the_model_leave_its_buffers_alone(x: Tensor, inplace: bool) -> None:
    class Counting(Model):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))
            self.register_buffer("last", torch.zeros(()))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            self.get_buffer("calls").add_(1)
            self.last = x.detach().mean()
            return super().forward(x, mask)

    model = Counting().eval()
    last = model.last
    gated = gatecc.transform(model, RECIPE, (x,), inplace=inplace)
    assert not model.calls
    assert model.last is last
    assert not gated.get_buffer("calls")
    assert not gated.get_buffer("last")


def test_inplace_keeps_parameter_objects(model: nn.Module, x: Tensor) -> None:
    kept = dict(model.named_parameters())
    result = gatecc.transform(model, RECIPE, (x,), inplace=True)
    assert result is model
    assert all(dict(model.named_parameters())[n] is p for n, p in kept.items())


@pytest.mark.parametrize("scope", ["auto", "model"])
def test_scopes(model: nn.Module, x: Tensor, scope: Any) -> None:
    gated = gatecc.transform(model, RECIPE, (x,), scope=scope)
    assert {name for name, _, _ in scopes(gated)} == (
        {""} if scope == "model" else {"blocks.0.attention", "blocks.1.attention"}
    )
    assert {n for n in gated.state_dict() if "gate" in n} == {
        f"blocks.{i}.attention.gate.{p}" for i in (0, 1) for p in ("weight", "bias")
    }
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    assert torch.allclose(gated(x, mask), model(x, mask), atol=1e-6)
    longer = torch.randn(3, 9, 16)
    assert torch.allclose(gated(longer), model(longer), atol=1e-6)


def test_selection_and_several_rewrites(model: nn.Module, x: Tensor) -> None:
    spec = GateSpec("self", "linear", "token", "sigmoid")
    rewrites = [
        Gate(Attention[0].heads, GateSpec("hidden", granularity="head")),
        Gate(Residual["blocks.1"].branch, spec),
    ]
    gated = gatecc.transform(model, rewrites, (x,))
    report = gatecc.last_report(gated)
    assert [(r.site, r.scope) for r in report.rewrites] == [
        ("blocks.0.attention#0", "blocks.0.attention"),
        ("blocks.1#0", "blocks.1"),
        ("blocks.1#1", "blocks.1"),
    ]
    assert torch.allclose(gated(x), model(x), atol=1e-6)


def test_each_layer_reuses_its_own_weight(model: nn.Module, x: Tensor) -> None:
    spec = GateSpec("hidden", "linear", "element", "sigmoid", init="reuse(q.weight)")
    gated = gatecc.transform(model, [Gate(Attention[...].heads, spec)], (x,))
    for i in (0, 1):
        attention = gated.get_submodule(f"blocks.{i}.attention")
        assert torch.equal(attention.get_parameter("gate.weight"), attention.get_parameter("q.weight"))


def test_tied_weights_stay_tied(x: Tensor) -> None:
    model = Model().eval()
    first: Any = model.blocks[0]
    second: Any = model.blocks[1]
    second.up.weight = first.up.weight
    gated: Any = gatecc.transform(model, [Gate(Linear["blocks.0.up"].out, GateSpec("in", granularity="token"))], (x,))
    assert gated.blocks[0].up.weight is gated.blocks[1].up.weight
    assert torch.allclose(gated(x), model(x), atol=1e-6)


def test_folding_into_a_tied_weight_is_refused(x: Tensor) -> None:
    model = Model().eval()
    first: Any = model.blocks[0]
    second: Any = model.blocks[1]
    second.attention.o.weight = first.attention.o.weight
    fold = gatecc.recipe(RECIPE, init="identity(how=fold)")
    before = first.attention.o.weight.clone()
    with pytest.raises(GateccError, match=r"attention\.o\.weight"):
        gatecc.transform(model, fold, (x,), inplace=True)
    assert torch.equal(first.attention.o.weight, before)


class Readers(nn.Module):
    """Reads weights of its attention past it."""

    def __init__(self, weight: str) -> None:
        super().__init__()
        self.inner = Model()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) + F.linear(x, self.inner.get_parameter(self.weight)).sum()


@pytest.mark.parametrize(
    ("weight", "options"),
    [
        ("blocks.0.attention.o.weight", {"init": "identity(how=fold)"}),
        ("blocks.0.attention.q.weight", {"fuse_into": "q", "granularity": "head"}),
    ],
    ids=["fold", "widen"],
)
def test_changing_a_weight_that_is_read_elsewhere_is_refused(x: Tensor, weight: str, options: Any) -> None:
    model = Readers(weight).eval()
    expected = model(x)
    with pytest.raises(GateccError, match="tied to another") as caught:
        gatecc.transform(model, gatecc.recipe(RECIPE, **options), (x,), inplace=True)
    assert caught.value.where == f"inner.{weight}"
    assert caught.value.found.startswith("it is read by the model test_transform.py:")
    assert torch.equal(model(x), expected)


# --- bad input: one clear error each, the model unchanged
# -----------------------------------------------------------------


def packed() -> nn.Module:
    model = Model()
    model.head.weight = nn.Parameter(torch.ones(5, 16, dtype=torch.int8), requires_grad=False)
    return model


class Quantised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Model()
        self.register_buffer("packed", torch.quantize_per_tensor(torch.randn(3), 0.1, 0, torch.qint8))

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


def half_empty() -> nn.Module:
    model = Model()
    next(model.children()).to("meta")
    return model


BAD: dict[str, tuple[Callable[[Tensor], Any], type[GateccError], str]] = {
    "unknown recipe": (lambda x: (Model(), "gated-atention", (x,)), UnknownRecipeError, "gated-attention"),
    "empty selection": (
        lambda x: (Model(), [Gate(MLP["encoder.*"].out, GateSpec("self"))], (x,)),
        EmptySelectionError,
        "encoder",
    ),
    "wrong rank": (lambda x: (Model(), RECIPE, (x[0, 0],)), ExampleInputsError, "does not run"),
    "wrong width": (lambda x: (Model(), RECIPE, (x[..., :7],)), ExampleInputsError, "does not run"),
    "unknown keyword": (lambda x: (Model(), RECIPE, {"y": x}), ExampleInputsError, "y"),
    "a bare tensor": (lambda x: (Model(), RECIPE, x), ExampleInputsError, "tuple"),
    "no recipe": (lambda x: (Model(), [], (x,)), ArgumentError, "recipe"),
    "a number for a recipe": (lambda x: (Model(), 3, (x,)), ArgumentError, "recipe"),
    "half on the meta device": (lambda x: (half_empty(), RECIPE, (x,)), UnsupportedModelError, "all of them, or none"),
    "scripted": (
        lambda x: (torch.jit.trace(Model().eval(), (x,), check_trace=False), RECIPE, (x,)),
        UnsupportedModelError,
        "script",
    ),
    "quantised": (lambda x: (Quantised(), RECIPE, (x,)), UnsupportedModelError, "packed"),
    "packed weights": (lambda x: (packed(), RECIPE, (x,)), UnsupportedModelError, "head.weight"),
    "no model": (lambda x: (len, RECIPE, (x,)), UnsupportedModelError, "nn.Module"),
}


@pytest.mark.parametrize("case", sorted(BAD))
@pytest.mark.filterwarnings("ignore")
def test_bad_input_gets_one_clear_error(case: str, x: Tensor) -> None:
    make, kind, word = BAD[case]
    model, recipe, inputs = make(x)
    state = {k: v.clone() for k, v in model.state_dict().items()} if isinstance(model, nn.Module) else {}
    with pytest.raises(kind) as caught:
        gatecc.transform(model, recipe, inputs, inplace=True)
    error = caught.value
    assert word in str(error)
    assert str(error).startswith(error.code)
    assert error.do or error.expected
    if isinstance(model, nn.Module) and not isinstance(model, torch.jit.ScriptModule):
        assert set(model.state_dict()) == set(state)
        assert not list(scopes(model))


def test_a_call_with_another_signature(model: nn.Module, x: Tensor) -> None:
    gated = gatecc.transform(model, RECIPE, (x,))
    with pytest.raises(TypeError, match=r"unexpected|nonsense"):
        gated(x, nonsense=3)
    with pytest.raises(TypeError):
        gated()
    assert torch.allclose(gated(x, mask=None), model(x), atol=1e-6)


def test_unknown_scope_and_option(model: nn.Module, x: Tensor) -> None:
    wrong: Any = "layer"
    with pytest.raises(ArgumentError, match="scope"):
        gatecc.transform(model, RECIPE, (x,), scope=wrong)
    with pytest.raises(ArgumentError, match="granularity"):
        gatecc.recipe(RECIPE, granulrity="head")


def test_data_dependent_model_climbs_down_the_ladder(x: Tensor) -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Model()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) if x.sum() > -1e9 else x

    model = Branching().eval()
    report = gatecc.inspect(model, (x,))
    assert [(r.fqn, r.rung) for r in report.rungs] == [("", "python"), ("inner", "submodule")]
    assert all(r.reason for r in report.rungs)
    gated = gatecc.transform(model, RECIPE, (x,))
    assert torch.allclose(gated(x), model(x), atol=1e-6)
    assert {n for n, _, _ in scopes(gated)} == {"inner.blocks.0.attention", "inner.blocks.1.attention"}


class BetweenChannels(nn.Module):
    """Cross-covariance attention (XCiT, EdgeNeXt, DaViT): channels attend to channels. x: (B, N, C)"""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(16, 48)
        self.o = nn.Linear(16, 16)

    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 4, 1)  # (B, H, D, N)
        return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT).softmax(-1) @ v

    def forward(self, x: Tensor) -> Tensor:
        return self.o(self.mixed(x).permute(0, 3, 1, 2).flatten(2))


class BetweenTokens(BetweenChannels):
    def mixed(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).mT


def test_gates_of_attention_between_channels_have_a_number_for_each_token() -> None:
    model, x = BetweenChannels(), torch.randn(2, 7, 16)
    gated = gatecc.transform(model, "gated-attention", (x,))
    assert torch.allclose(gated(x), model(x), atol=1e-6)
    w, b = (nn.init.normal_(gated.get_parameter(f"gate.{name}")).detach() for name in ("weight", "bias"))

    class Gated(BetweenChannels):
        def mixed(self, x: Tensor) -> Tensor:
            gate = 2 * torch.sigmoid(F.linear(x, w, b))  # (B, N, H)
            return super().mixed(x) * gate.transpose(1, 2).unsqueeze(2)

    by_hand = Gated()
    by_hand.load_state_dict(model.state_dict())
    for batch in (x, torch.randn(3, 11, 16)):
        torch.testing.assert_close(gated(batch), by_hand(batch))


@pytest.mark.parametrize("recipe", ["gla", "affine-attention"])
def test_what_is_made_for_tokens_does_not_fit_attention_between_channels(recipe: str) -> None:
    x = torch.randn(2, 7, 16)
    both = nn.Sequential(BetweenChannels(), BetweenTokens())
    with pytest.raises(SiteRefusedError, match=r"(?s)0 .*here channels attend to channels"):
        gatecc.transform(both, gatecc.recipe(recipe, sites="attention[0]"), (x,))
    rows = gatecc.last_report(gatecc.transform(both, recipe, (x,))).rewrites
    assert {row.scope for row in rows} == {"1"}  # neither what mixes tokens nor the gate that belongs to it


def test_scores_of_attention_between_channels_have_no_tokens() -> None:
    model, x = BetweenChannels(), torch.randn(2, 7, 16)
    with pytest.raises(SiteRefusedError, match="axes bhdc of matmul count no tokens"):
        gatecc.transform(model, [Gate(Attention[...].scores, GateSpec("hidden", granularity="head"))], (x,))
    gated = gatecc.transform(model, [Gate(Attention[...].scores, GateSpec("pool(hidden)", granularity="head"))], (x,))
    longer = torch.cat([x, x], 1)
    torch.testing.assert_close(gated(longer), model(longer))
