"""How experts are filled, and which of the ways start as the dense layer: a gated one with biases, and a linear one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gatecc.errors import ArgumentError
from gatecc.ir.rewrite import rewrite_from_json
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.route import Route
from gatecc.passes.route.spec import ExpertsSpec
from gatecc.passes.route.split import decoded, encoded
from tests.graphs import Done, done

GATED = """
    @mlp.gate.weight  # 16 8
    @mlp.gate.bias  # 16
    @mlp.up.weight  # 16 8
    @mlp.up.bias  # 16
    @mlp.down.weight  # 8 16
    @mlp.down.bias  # 8
    %x = input  # b n 8
    %gate = linear(%x, @mlp.gate.weight, @mlp.gate.bias)  # b n 16 | mlp.gate
    %act = silu(%gate)  # b n 16 | mlp
    %up = linear(%x, @mlp.up.weight, @mlp.up.bias)  # b n 16 | mlp.up
    %hidden = mul.Tensor(%act, %up)  # b n 16 | mlp
    %down = linear(%hidden, @mlp.down.weight, @mlp.down.bias)  # b n 8 | mlp.down
    %sum = add.Tensor(%x, %down)  # b n 8
    return %sum
"""
LINEAR = """
    @proj.weight  # 12 8
    @proj.bias  # 12
    %x = input  # b n 8
    %y = linear(%x, @proj.weight, @proj.bias)  # b n 12 | proj
    return %y
"""
NO_RENORM = "softmax_topk(2, renorm=False)"
EXACT = [  # experts, choice, init of the router
    ("copies(8)", "softmax_topk(2)", "random(std=3)"),
    ("copies(8)", "softmax_topk(1, straight=True)", "random(std=3)"),
    ("copies(8)", NO_RENORM, "zero"),
    ("copies(6)", NO_RENORM, "zero"),
    ("copies(4, extra=3)", "softmax_topk(2)", "random(std=3)"),
    ("widths((1, 1.5, 1, 2))", "softmax_topk(2)", "random(std=3)"),
    ("shared(copies(4))", NO_RENORM, "random(std=3)"),
    ("shared(drop(4, 0.5), gated=True)", "softmax_topk(2)", "random(std=3)"),
    ("shared(split(4), gated=True)", "softmax_topk(2)", "random(std=3)"),
    ("split(4)", "softmax_topk(4)", "zero"),
    ("split(8, by=random(3))", "softmax_topk(8, renorm=False)", "zero"),
    ("split(4, by=kmeans)", "softmax_topk(4)", "zero"),
    ("split(4)", "unweighted(4)", "similar"),
    ("groups(4, 3)", "per_group(4)", "random(std=3)"),
    ("groups(4, 4, by=kmeans)", "per_group(4, k=2)", "random(std=3)"),
]
CHANGED = [
    ("copies(8)", NO_RENORM, "random(std=3)", "do not add up the same for all tokens"),
    ("copies(4, noise=0.1)", "softmax_topk(2)", "zero", "do not start as the layer"),
    ("copies(4, keep=0.5)", "softmax_topk(2)", "zero", "do not start as the layer"),
    ("drop(4)", "softmax_topk(2)", "zero", "do not start as the layer"),
    ("widths((0.5, 1))", "softmax_topk(1)", "zero", "do not start as the layer"),
    ("split(4)", "softmax_topk(2)", "zero", "do not add up"),
    ("split(4)", "unweighted(3)", "similar", "do not add up"),
    ("groups(4, 3)", "softmax_topk(4)", "random(std=3)", "do not add up"),  # ties of tied rows are no guarantee
]


def routed(text: str, experts: str, choice: str, init: str = "random(std=3)", **options: Any) -> tuple[Route, Done]:
    torch.manual_seed(0)
    router = RouterSpec("in", "linear(bias=False)", choice, init)
    route = Route("linear[...]" if text is LINEAR else "mlp[...]", router, ExpertsSpec.parse(experts), **options)
    return route, done(text, route)


def relative(result: Done) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(result.run(), result.before, strict=True))


@pytest.mark.parametrize("text", [GATED, LINEAR], ids=["gated", "linear"])
@pytest.mark.parametrize(("experts", "choice", "init"), EXACT)
def test_exact_modes_start_as_the_layer(text: str, experts: str, choice: str, init: str) -> None:
    route, result = routed(text, experts, choice, init)
    assert route.contract().kind == "identity_at_init"
    assert relative(result) < 3e-7
    site = result.edits[0].site
    assert all(site.key in note for note in route.notes(site))
    assert "starts as the dense layer" in next(iter(route.notes(site)))


@pytest.mark.parametrize(("experts", "choice", "init", "why"), CHANGED)
def test_other_combinations_are_said_to_change_the_function(experts: str, choice: str, init: str, why: str) -> None:
    route, result = routed(GATED, experts, choice, init)
    assert route.contract().kind == "changes_function"
    assert why in " ".join(route.notes(result.edits[0].site))
    assert relative(result) > 1e-3


def test_weights_that_are_1_are_told_from_those_that_are_rounded() -> None:
    for choice, init, kind in (
        ("softmax_topk(1, straight=True)", "random(std=3)", "exact:"),
        (NO_RENORM, "zero", "exact:"),
        ("softmax_topk(3)", "random(std=3)", "exact up to rounding:"),
    ):
        route, result = routed(LINEAR, "copies(8)", choice, init)
        assert kind in next(iter(route.notes(result.edits[0].site)))


def test_two_routers_yield_half_of_the_features_each() -> None:
    also = RouterSpec("pool(in)", "linear(bias=False)", "softmax_topk(1, straight=True)", "random(std=3)")
    route, result = routed(GATED, "copies(4)", "softmax_topk(2)", combine="cat", also=also)
    assert route.contract().kind == "identity_at_init"
    assert relative(result) < 3e-7
    names = dict(result.program.module.named_parameters())
    assert names["mlp.experts.down_proj"].shape == names["mlp.experts_1.down_proj"].shape == (4, 4, 16)
    with torch.no_grad():
        names["mlp.experts_1.down_proj"].mul_(2)
        names["mlp.experts_1.down_proj_bias"].mul_(2)
    x, y, before = result.values["x"], result.run()[0], result.before[0]
    assert torch.allclose(y[..., :4], before[..., :4], atol=1e-6)
    assert torch.allclose((y - x)[..., 4:], 2 * (before - x)[..., 4:], atol=1e-5)


def test_the_first_experts_are_added_and_the_others_do_not_run() -> None:
    route, result = routed(GATED, "split(4)", "prefix(lead=0)", combine="prefix")
    assert route.contract().kind == "changes_function"
    assert routed(GATED, "split(4)", "prefix", "zero", combine="prefix")[0].contract().kind == "identity_at_init"
    mlp: Any = result.program.module.get_submodule("mlp")
    x = result.values["x"]
    taken = (x @ mlp.router.weight.T).argmax(-1)
    assert mlp.router.weight.shape == (5, 8)
    assert len(set(taken.flatten().tolist())) > 2
    expected = x + mlp.experts.bias
    for e in range(4):
        gate, up = F.linear(x, mlp.experts.gate_up_proj[e], mlp.experts.gate_up_proj_bias[e]).chunk(2, -1)
        expected = expected + (taken > e).unsqueeze(-1) * F.linear(F.silu(gate) * up, mlp.experts.down_proj[e])
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_a_router_starts_with_the_mean_direction_of_its_experts_neurons() -> None:
    mlp: Any = routed(GATED, "split(4)", "unweighted(2)", "similar(scale=2)")[1].program.module.get_submodule("mlp")
    means = F.normalize(mlp.experts.gate_up_proj[:, :4], dim=-1).mean(1)  # the rows of the gate
    assert torch.allclose(F.cosine_similarity(mlp.router.weight, means), torch.ones(4), atol=1e-5)
    assert float(mlp.router.weight.detach().norm(dim=-1).mean()) == pytest.approx(2)
    low = Route("mlp[...]", RouterSpec("in", "lowrank(3)", "unweighted(2)", "similar"), ExpertsSpec.parse("split(4)"))
    with pytest.raises(ArgumentError, match=r"no row in the experts' input"):
        done(GATED, low)


def test_each_slot_yields_features_of_its_own() -> None:
    route, result = routed(GATED, "copies(6)", "per_group(2)", combine="slots")
    assert route.contract().kind == "identity_at_init"
    assert relative(result) < 3e-7
    assert dict(result.program.module.named_parameters())["mlp.experts.down_proj"].shape == (6, 4, 16)


def test_smoothing_adds_the_uniform_share_of_what_an_expert_is_not_trusted_with() -> None:
    one = routed(LINEAR, "copies(3)", "softmax_topk(1, straight=True)", combine="smooth")
    assert one[0].contract().kind == "identity_at_init"
    assert relative(one[1]) < 3e-7
    route, result = routed(LINEAR, "copies(3)", "softmax_topk(2)", combine="smooth")
    assert route.contract().kind == "changes_function"
    router = result.program.module.get_submodule("proj.router").get_parameter("weight")
    g = torch.softmax((result.values["x"] @ router.T).topk(2, -1).values, -1)
    expected = result.before[0] + (g * (1 - g)).sum(-1, keepdim=True) / 12
    assert torch.allclose(result.run()[0], expected, atol=1e-6)


def test_a_token_that_skips_gets_nothing() -> None:
    route, result = routed(LINEAR, "copies(2)", "softmax_topk(1, straight=True)", skip=True)
    assert route.contract().kind == "changes_function"
    router = result.program.module.get_submodule("proj.router").get_parameter("weight")
    assert router.shape == (3, 8)
    skipped = (result.values["x"] @ router.T).argmax(-1) == 2
    assert 0 < int(skipped.sum()) < skipped.numel()
    y = result.run()[0]
    assert not y[skipped].any()
    assert torch.allclose(y[~skipped], result.before[0][~skipped], atol=1e-6)


def test_experts_of_a_split_are_the_neurons_of_the_layer_once_each_and_its_bias_is_added_once() -> None:
    result = routed(GATED, "split(4, by=random(1))", "softmax_topk(4)", "zero")[1]
    experts: Any = result.program.module.get_submodule("mlp.experts")
    x = result.values["x"]
    parts = []
    for e in range(4):
        gate, up = F.linear(x, experts.gate_up_proj[e], experts.gate_up_proj_bias[e]).chunk(2, -1)
        parts.append(F.linear(F.silu(gate) * up, experts.down_proj[e] / 4))  # four weights of 1/4
    assert torch.allclose(x + sum(parts) + experts.bias, result.before[0], atol=1e-5)


def test_a_share_of_the_neurons_starts_anew_and_others_in_each_expert() -> None:
    result = routed(GATED, "drop(3, 0.25)", "softmax_topk(2)")[1]
    rows = result.program.module.get_submodule("mlp.experts").get_parameter("gate_up_proj")
    first = routed(GATED, "copies(1)", "softmax_topk(1)")[1].program.module.get_submodule("mlp.experts")
    same = (rows == first.get_parameter("gate_up_proj")).all(-1)  # (E, 2F)
    assert same.sum(-1).tolist() == [24, 24, 24]
    assert torch.equal(same[:, :16], same[:, 16:])  # a neuron is a row of the gate and one of up
    assert len({tuple(s.tolist()) for s in same}) > 1


def test_the_strongest_neurons_are_kept() -> None:
    result = routed(GATED, "copies(2, keep=0.5)", "softmax_topk(2)")[1]
    whole = routed(GATED, "copies(1)", "softmax_topk(1)")[1].program.module.get_submodule("mlp.experts")
    rows, down = whole.get_parameter("gate_up_proj")[0], whole.get_parameter("down_proj")[0]
    strength = rows[:16].norm(dim=1) * rows[16:].norm(dim=1) * down.norm(dim=0)
    kept = strength.topk(8).indices.sort().values
    experts = result.program.module.get_submodule("mlp.experts")
    assert torch.equal(experts.get_parameter("down_proj")[1], down[:, kept])


def test_a_measured_partition_is_read_by_the_name_of_the_layer() -> None:
    chosen = torch.arange(16) % 4
    assert decoded(encoded(chosen)).tolist() == chosen.tolist()
    experts = f'split(4, by=measured(("mlp.down",), ("{encoded(chosen)}",)))'
    route, result = routed(GATED, experts, "softmax_topk(4)", "zero")
    assert not route.effects().same_for_layers
    assert relative(result) < 3e-7
    whole = routed(GATED, "copies(1)", "softmax_topk(1)")[1].program.module.get_submodule("mlp.experts")
    part = result.program.module.get_submodule("mlp.experts").get_parameter("down_proj")[1]
    assert torch.equal(part, 4 * whole.get_parameter("down_proj")[0][:, 1::4])
    with pytest.raises(ArgumentError, match=r"mlp\.down: no partition of this layer"):
        routed(GATED, experts.replace("mlp.down", "other"), "softmax_topk(4)", "zero")


def test_a_rewrite_is_the_same_after_json() -> None:
    also = RouterSpec("pool(in)", "linear", "softmax_topk(1)", "zero")
    for route in (
        Route("mlp[...]", RouterSpec(), ExpertsSpec.parse("shared(groups(2, 3, by=kmeans(4)), gated=True)"), skip=True),
        Route("mlp[...]", RouterSpec(), ExpertsSpec.parse("drop(4, 0.25)"), combine="cat", also=also),
    ):
        assert rewrite_from_json(route.to_json()) == route


@pytest.mark.parametrize(
    ("experts", "choice", "options", "message"),
    [
        ("split(5)", "softmax_topk(5)", {}, r"16 hidden neurons, 5 groups(.|\n)*4"),
        ("copies(2)", "softmax_topk(3)", {}, r"k=3 of 2"),
        ("groups(4, 2)", "per_group(3)", {}, r"8 experts, 3 groups"),
        ("groups(2, 2)", "per_group(2, k=3)", {}, r"k=3 of 2"),
        ("copies(0)", "softmax_topk(1)", {}, r"n=0"),
        ("drop(4, 0.01)", "softmax_topk(2)", {}, r"no neuron would start anew"),
        ("copies(4)", "softmax_topk(2)", {"combine": "cat"}, r"a second router"),
        ("copies(4)", "softmax_topk(2)", {"combine": "slots"}, r"per_group"),
        ("split(4)", "per_group(4)", {"combine": "slots"}, r"copies of these rows"),
        ("copies(9)", "per_group(3)", {"combine": "slots"}, r"8 features, 3 parts"),
        ("split(4)", "prefix", {}, r"combine='sum' with prefix"),
        ("split(4)", "unweighted(4)", {"combine": "prefix"}, r"combine='prefix' with unweighted"),
        ("split(4)", "prefix", {"combine": "prefix", "skip": True}, r"skip=True"),
        ("shared(shared(copies(2)))", "softmax_topk(2)", {}, r"experts without a shared one"),
    ],
)
def test_what_does_not_go_together_is_refused(experts: str, choice: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        routed(GATED, experts, choice, **options)
