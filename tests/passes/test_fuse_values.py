"""Fuse in its wider forms: any number of values, of other sites, inputs or new ones. Expected values by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, EmptySelectionError, GateccError, SiteRefusedError
from gatecc.ir.rewrite import rewrite_from_json
from gatecc.passes.branch.low_rank import Lora
from gatecc.passes.fuse import Fuse
from tests.graphs import MLP, done
from tests.recipes.checks import agree, new_parameters, randomise, reverted

JOIN = "residual[...].out"


def _spec(text: str) -> Any:
    return gatecc.GateSpec.parse(text)


def _scores(result: Any, name: str, x: Tensor) -> Tensor:
    gate = result.program.module.get_submodule(name)
    return x @ gate.get_parameter("weight").T + gate.get_parameter("bias")


@pytest.mark.parametrize(("mode", "act"), [("convex", "softmax"), ("convex", "softmax(T=2.0)"), ("free", "sigmoid")])
def test_a_gate_over_three_values(mode: str, act: str) -> None:
    gate = _spec(f"pool(skip)+pool(branch), linear, expert, {act}, init=random(std=1)")
    rewrite: Any = Fuse(JOIN, gate, ("skip", "branch", "self"), mode=mode)
    result = done(MLP, rewrite)
    x, down = result.values["x"], result.values["down"]
    z = _scores(result, "gate", torch.cat([x.mean(1), down.mean(1)], -1))
    w = {"softmax": z.softmax(-1), "softmax(T=2.0)": (z / 2).softmax(-1), "sigmoid": z.sigmoid()}[act][:, :, None, None]
    assert torch.allclose(result.run()[0], w[:, 0] * x + w[:, 1] * down + w[:, 2] * (x + down), atol=1e-5)


@pytest.mark.parametrize("mode", ["free", "add"])
@pytest.mark.parametrize("granularity", ["channel", "token", "element"])
def test_each_value_has_a_gate_of_its_own(mode: Any, granularity: str) -> None:
    gate = _spec(f"fused(0)+fused(1), linear, {granularity}, tanh, init=random(std=1)")
    result = done(MLP, Fuse(JOIN, gate, ("skip", "branch"), mode=mode, scale=0.5))
    x, down = result.values["x"], result.values["down"]
    read = torch.cat([x, down], -1)
    first = torch.tanh(_scores(result, "gate", read))
    if mode == "add":
        expected = x + 0.5 * first * down
    else:
        expected = 0.5 * (first * x + torch.tanh(_scores(result, "gate_1", read)) * down)
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_added_weights_over_the_values_leave_the_first_whole() -> None:
    gate = _spec("skip, linear, expert, softmax, init=random(std=1)")
    result = done(MLP, Fuse(JOIN, gate, ("self", "skip", "branch"), mode="add"))
    x, down = result.values["x"], result.values["down"]
    w = _scores(result, "gate", x).softmax(-1)
    assert torch.allclose(result.run()[0], x + down + w[..., :1] * x + w[..., 1:] * down, atol=1e-5)


@pytest.mark.parametrize("picked", range(3))
def test_a_softmax_that_starts_at_the_first_value_is_it_and_one_hot_is_any(picked: int) -> None:
    gate = _spec("skip, linear, expert, softmax, init=first(bias=40.0)")
    result = done(MLP, Fuse(JOIN, gate, ("self", "skip", "branch")))
    bias = result.program.module.get_submodule("gate").get_parameter("bias")
    assert result.error == 0
    with torch.no_grad():
        bias.zero_()[picked] = 40.0
    x, down = result.values["x"], result.values["down"]
    assert torch.allclose(result.run()[0], (x + down, x, down)[picked], atol=1e-6)


def test_what_the_contract_promises() -> None:
    start = _spec("skip, linear, channel, sigmoid")
    zero = _spec("skip, linear, channel, tanh, init=zero")
    assert done(MLP, free := Fuse(JOIN, start, mode="free")).error <= 1e-6
    assert done(MLP, added := Fuse(JOIN, zero, ("self", "skip"), mode="add")).error == 0
    new = Fuse(JOIN, start, ("self", str(Lora(2, of="self"))), mode="add")
    assert {str(one.contract()) for one in (free, added, new)} == {"identity_at_init(1e-06)"}
    for one in (
        Fuse(JOIN, start, ("skip", "self"), mode="free"),
        Fuse(JOIN, zero, ("skip", "branch"), mode="add"),
        Fuse(JOIN, _spec("skip, linear, expert, softmax, init=zero"), scale=2.0),
    ):
        assert str(one.contract()) == "changes_function"


class Streams(nn.Module):
    """Two streams of two layers, x: (B, N, 8), c: (B, M, C); ``by_hand`` sees what each layer of x yields, and of c."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.audio = nn.ModuleList(nn.Sequential(nn.Linear(channels, channels), nn.Tanh()) for _ in range(2))
        self.vision = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.by_hand: Any = None

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        outputs: list[Tensor] = []
        for layer in self.audio:
            outputs.append(c := layer(c))
        for i, layer in enumerate(self.vision):
            x = layer(x)
            x = x if self.by_hand is None else self.by_hand(i, x, outputs[i])
        return x, c


def _inputs(n: int, m: int, channels: int = 8) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, n, 8), torch.randn(2, m, channels)


GATE = "self+fused(1), linear, element, sigmoid, init=random(std=1)"


@pytest.mark.parametrize("everywhere", [False, True])
def test_the_kth_site_is_fused_with_the_kth_value_of_another_stream(everywhere: bool) -> None:
    plain = Streams().eval()
    inputs = _inputs(5, 5)
    rewrite = Fuse(
        "activation[vision.*]", _spec(GATE), ("self", 'at("activation[audio.*].out")'), everywhere=everywhere
    )
    model: Any = gatecc.transform(plain, rewrite, inputs)
    gates = [m for m in model.modules() if type(m).__name__ == "GateModule"]

    def by_hand(layer: int, x: Tensor, c: Tensor) -> Tensor:
        g = torch.sigmoid(torch.cat([x, c], -1) @ gates[layer].weight.T + gates[layer].bias)
        return g * x + (1 - g) * c

    reference = Streams()
    reference.load_state_dict(plain.state_dict())
    reference.by_hand = by_hand
    for x, c in (inputs, _inputs(4, 4)):
        if not everywhere:
            assert agree(model, reference, x, c) <= 1e-6
            continue
        first = by_hand(0, plain.vision[0](x), plain.audio[0](c))
        both = by_hand(1, plain.vision[1](first), plain.audio[1](first))
        with torch.no_grad():
            assert all(torch.allclose(got, both, atol=1e-6) for got in model(x, c))
    reverted(model, plain, inputs)


def test_values_of_other_shapes_or_streams_are_refused_and_so_is_a_length_that_grows_apart() -> None:
    rewrite = Fuse(
        "activation[vision.*]",
        _spec("self, linear, token, sigmoid, init=zero"),
        ("self", 'at("activation[audio.*].out")'),
    )
    for inputs, channels in ((_inputs(5, 7), 8), (_inputs(5, 5, 6), 6)):
        with pytest.raises(SiteRefusedError, match="the values of a fusion have other shapes"):
            gatecc.transform(Streams(channels).eval(), rewrite, inputs)
    model = gatecc.transform(Streams().eval(), rewrite, _inputs(5, 5))
    with pytest.raises(GateccError), torch.no_grad():
        model(*_inputs(5, 7))


def test_names_that_nothing_has_and_single_values_are_refused() -> None:
    gate = _spec("self, linear, token, sigmoid, init=zero")
    model, inputs = Streams().eval(), _inputs(5, 5)
    for values, error, match in (
        (("self", "attic"), SiteRefusedError, "needs 'attic'"),
        (("self", 'at("activation[attic.*].out")'), EmptySelectionError, "attic"),
        (("self", 'at("activation[audio.0.*,audio.1.*,vision.0.*].out")'), SiteRefusedError, "no source for each of"),
        (("self", "cond(text)"), SiteRefusedError, "no input 'text'"),
        (("self",), ArgumentError, "several values"),
        ("self", ArgumentError, "several values"),
        (("self", "pool(self)"), ArgumentError, "no value that can be fused"),
        (("self", "loras(2)"), ArgumentError, "no value that can be fused"),
        (("self", "lora(rank=0)"), ArgumentError, "rank"),
    ):
        with pytest.raises(error, match=match):
            gatecc.transform(model, Fuse("activation[vision.*]", gate, values), inputs)
    read = Fuse("activation[vision.*]", _spec("fused(2), linear, token, sigmoid, init=zero"), ("self", "self"))
    with pytest.raises(ArgumentError, match="reads value 2 of a fusion"):
        gatecc.transform(model, read, inputs)
    with pytest.raises(ArgumentError, match="reads value 0 of a fusion"):
        gatecc.transform(model, gatecc.Gate("activation[vision.*]", _spec("fused(0), linear, token, sigmoid")), inputs)


def test_choices_that_do_not_go_together() -> None:
    own, over = (_spec(f"self, linear, {of}, sigmoid, init=zero") for of in ("channel", "expert"))
    three = ("self", "skip", "branch")
    for options, match in (
        ({"gate": own, "values": three}, "come from a gate over the values"),
        ({"gate": over, "values": three}, "sum to 1"),
        ({"gate": own, "mode": "best"}, "no such fusion"),
        ({"gate": own, "mode": "scale"}, "scaled in their places"),
        ({"gate": _spec("self, linear, channel, sigmoid")}, "lie between 0 and 1"),
        ({"gate": own, "values": ("self", "lora(2)"), "everywhere": True}, "where a value was before"),
    ):
        with pytest.raises(ArgumentError, match=match):
            Fuse(JOIN, **options)
    with pytest.raises(ArgumentError, match="preferred by a bias"):
        _spec("self, linear(bias=False), expert, softmax, init=first")


def test_texts_and_objects_are_the_same_rewrite_and_a_new_value_is_built() -> None:
    gate = _spec("fused(1), linear, scalar, sigmoid, init=random(std=1)")
    texts, objects = (Fuse("mlp[...].out", gate, ("self", one)) for one in ("lora(2, of='in')", Lora(2)))
    assert texts == objects == rewrite_from_json(objects.to_json())
    model: Any = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)).eval()
    holder = nn.ModuleDict({"mlp": model})

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = holder["mlp"]

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x)

    plain, x = Held().eval(), torch.randn(2, 5, 8)
    made: Any = gatecc.transform(plain, objects, (x,))
    new = new_parameters(made, plain)
    randomise(new.values(), 0.5)
    a, b, w, bias = (next(p for n, p in new.items() if n.endswith(end)) for end in (".a", ".b", "weight", "bias"))
    adapter = x @ a.T @ b.T * 8.0
    g = torch.sigmoid(adapter @ w.T + bias)
    with torch.no_grad():
        assert torch.allclose(made(x), x + g * plain.mlp(x) + (1 - g) * adapter, atol=1e-5)
