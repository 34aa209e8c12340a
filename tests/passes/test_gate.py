"""The gate rewrite on small graphs; the golden cases in tests/golden/gate show what it makes of them."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, EmptySelectionError, SiteRefusedError
from gatecc.ir.edit import NewModule
from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.ir.weights import WidenWeight
from gatecc.ir.widen import Rows, new_features, own_features
from gatecc.passes.gate import Gate
from tests.graphs import MLP, attention, done


def _gate(site: str, *spec: Any, **options: Any) -> Gate:
    own = {k: options.pop(k) for k in ("op", "skip", "where", "label") if k in options}
    return Gate(Selector.parse(site), GateSpec(*spec, **options), **own)


@given(
    stage=st.sampled_from(["mlp.out", "mlp.hidden", "mlp.in", "residual.skip", "residual.branch", "activation.in"]),
    source=st.sampled_from(["self", "pool(self)", "param"]),
    granularity=st.sampled_from(["scalar", "channel", "token", "element"]),
    activation=st.sampled_from(["sigmoid", "1+tanh", "linear", "relu"]),
)
def test_a_gate_that_starts_at_one_is_the_identity(stage: str, source: str, granularity: str, activation: str) -> None:
    pooled, constant = source.startswith("pool"), source == "param"
    if granularity in ("token", "element") and (pooled or constant):
        assume(False)  # refused: see tests/ir/gates
    kind, _, name = stage.partition(".")
    scorer = "none" if constant else "linear"
    result = done(MLP, _gate(f"{kind}[...].{name}", source, scorer, granularity, activation))
    assert result.error <= 1e-6
    (step,) = result.steps
    assert isinstance(step, NewModule)
    with torch.no_grad():
        for p in result.program.module.get_submodule(step.path).parameters():
            p.normal_()
    assert result.error > 1e-4


@pytest.mark.parametrize("op", ["mul", "lerp"])
def test_the_gate_is_what_it_says(op: Literal["mul", "lerp"]) -> None:
    result = done(
        MLP, _gate("residual[...].branch", "skip", "linear", "channel", "sigmoid", init="random(std=1)", op=op)
    )
    v, x = result.values, result.values["x"]
    gate = result.program.module.get_submodule("gate")
    g = torch.sigmoid(x @ gate.get_parameter("weight").T + gate.get_parameter("bias"))
    branch = g * v["down"] + ((1 - g) * x if op == "lerp" else 0)
    assert torch.allclose(result.run()[0], x + branch, atol=1e-6)


def test_a_gated_input_is_gated_for_its_own_site_only() -> None:
    result = done(MLP, _gate("mlp[...].in", "param", "none", "scalar", "linear"))
    with torch.no_grad():
        next(result.program.module.get_submodule("mlp.gate").parameters()).zero_()
    x = result.values["x"]
    silent = torch.nn.functional.gelu(torch.zeros(1)) @ torch.zeros(1)
    assert torch.equal(result.run()[0], x + silent), "the skip still carries the whole input"


def test_tokens_outside_the_mask_are_left_alone() -> None:
    result = done(MLP, _gate("mlp[...].out", "self", "linear", "token", "tanh", init="zero", where="mask"))
    marked = torch.tensor([[True, False, True], [False, False, True]])
    result.program.example[1] = marked
    got = result.run()[0]
    x, down = result.values["x"], result.values["down"]
    assert torch.allclose(got, x + torch.where(marked[..., None], 0.0, down), atol=1e-6)


def test_later_gates_see_earlier_ones() -> None:
    first = _gate("mlp[...].out", "param", "none", "scalar", "linear", label="first")
    second = _gate("mlp[...].out", "self", "linear", "channel", "sigmoid", label="second")
    result = done(MLP, first, second)
    module = result.program.module
    with torch.no_grad():
        next(module.get_submodule("mlp.first").parameters()).fill_(3.0)
        module.get_submodule("mlp.second").get_parameter("weight").normal_()
    scaled = 3 * result.values["down"]
    gate = module.get_submodule("mlp.second")
    g = 2 * torch.sigmoid(scaled @ gate.get_parameter("weight").T + gate.get_parameter("bias"))
    assert torch.allclose(result.run()[0], result.values["x"] + g * scaled, atol=1e-5)


def test_two_gates_of_one_name_are_two_modules() -> None:
    gate = _gate("mlp[...].out", "self", "linear", "token", "sigmoid")
    paths = [step.path for step in done(MLP, gate, gate).steps]
    assert paths == ["mlp.gate", "mlp.gate_1"]


def test_a_weight_can_be_reused_as_the_scorer() -> None:
    result = done(
        attention(), _gate("attention[...].heads", "hidden", "linear", "element", "sigmoid", init="reuse(att.q.weight)")
    )
    gate = result.program.module.get_submodule("att.gate")
    assert torch.equal(gate.get_parameter("weight"), result.program.module.get_parameter("att.q.weight"))


@pytest.mark.parametrize(
    ("site", "spec", "options", "message"),
    [
        ("attention[...].weights", ("hidden", "linear", "head"), {}, "the site has no value 'weights'"),
        (
            "attention[...].heads",
            ("hidden", "linear", "head"),
            {"where": "padding"},
            "the model has no input 'padding'",
        ),
        ("attention[...].heads", ("cond(t)", "linear", "head"), {}, "the model has no input 't'"),
        ("attention[...].heads", ("hidden", "linear", "head"), {"fuse_into": "gate"}, "cannot be fused into gate"),
        ("attention[...].v", ("self", "linear", "head"), {"fuse_into": "v"}, "cannot be fused into"),
    ],
)
def test_what_cannot_be_done_is_refused(
    site: str, spec: tuple[str, ...], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(SiteRefusedError, match=message) as error:
        done(attention(), _gate(site, *spec, "sigmoid", **options))
    assert "do " in str(error.value)


def test_a_source_without_sites_is_an_empty_selection() -> None:
    with pytest.raises(EmptySelectionError):
        done(MLP, _gate("mlp[...].out", 'at("conv[...].out")', "linear", "channel", "1+tanh"))
    with pytest.raises(ArgumentError, match="only a linear gate"):
        GateSpec("hidden", "lowrank(2)", "head", "sigmoid", fuse_into="q")
    with pytest.raises(ArgumentError, match="not as a copy"):
        GateSpec("hidden", "linear", "head", "sigmoid", init="reuse(att.q.weight)", fuse_into="q")


@given(groups=st.integers(1, 4), old=st.integers(1, 5), new=st.integers(1, 3))
def test_widening_is_undone_bitwise_and_its_parts_are_found_again(groups: int, old: int, new: int) -> None:
    rows = Rows(groups, old, new)
    weight, more = torch.randn(groups * old, 3), torch.randn(groups * new, 3)
    wide = rows.widen(weight, more)
    assert torch.equal(rows.narrow(wide), weight)
    x = torch.randn(2, 3)
    assert torch.allclose(own_features(x @ wide.T, groups, old, new), x @ weight.T, atol=1e-6)
    assert torch.allclose(new_features(x @ wide.T, groups, old, new), x @ more.T, atol=1e-6)


def test_a_projection_takes_the_rows_of_one_gate() -> None:
    gate = _gate("attention[...].heads", "hidden", "linear", "head", "sigmoid", fuse_into="q")
    with pytest.raises(SiteRefusedError, match="cannot take rows") as error:
        done(attention(), gate, gate)
    assert "widened already, to (12, 8)" in str(error.value)


def test_rows_of_a_group_lie_behind_its_queries() -> None:
    result = done(attention(), _gate("attention[...].heads", "hidden", "linear", "head", "sigmoid", fuse_into="q"))
    wide, module = result.steps
    assert isinstance(wide, WidenWeight)
    assert wide.rows == Rows(groups=2, old=4, new=2)
    assert isinstance(module, NewModule)
    assert not list(result.program.module.get_submodule(module.path).parameters()), "its rows are its parameters"
    assert result.error <= 1e-6


class Prompted(nn.Module):
    """Attention to three learned keys beside the tokens, or to these alone."""

    def __init__(self, alone: bool) -> None:
        super().__init__()
        self.prompt = nn.Parameter(torch.randn(1, 4, 3, 4))
        self.q, self.kv, self.alone = nn.Linear(16, 16), nn.Linear(16, 16), alone

    def forward(self, x: Tensor) -> Tensor:
        q, kv = (f(x).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.kv))
        prompt = self.prompt.expand(x.size(0), -1, -1, -1)
        keys = prompt if self.alone else torch.cat([prompt, kv], 2)
        return nn.functional.scaled_dot_product_attention(q, keys, keys).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("alone", [True, False])
def test_keys_that_are_no_tokens_take_no_gate_of_the_tokens(alone: bool) -> None:
    x = torch.randn(2, 6, 16)
    with pytest.raises(SiteRefusedError, match=f"{3 if alone else 9} on the example"):
        gatecc.transform(Prompted(alone).eval(), gatecc.recipe("gated-attention", position="v"), (x,))
    gated = gatecc.transform(Prompted(alone).eval(), "gated-attention", (x,))  # its queries are tokens
    assert gated(torch.cat([x, x], 1)).shape == (2, 12, 16)
