"""Effects on weights through the engine: each layer its own, and all of them taken back bitwise."""

from __future__ import annotations

import copy
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.engine.analyse import evaluation
from gatecc.errors import GraphError
from gatecc.ir.contract import Contract, changes_function, exact
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.site import Site
from gatecc.ir.weights import Drop
from gatecc.scope.state import scopes

X = torch.randn(2, 3, 4)


class FF(nn.Module):
    """A residual feed-forward layer."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.drop, self.down = nn.Linear(4, 8), nn.Dropout(0.0), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(torch.relu(self.up(x))))


class Net(nn.Module):
    """Layers of one structure, which share a graph."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(FF() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


@dataclass(frozen=True)
class Doubled(gatecc.Rewrite):
    """Adds a second product with the weight of its own layer."""

    name = "doubled"

    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    def contract(self) -> Contract:
        return changes_function()

    def rewrite(self, site: Site, edit: Editor) -> None:
        name = edit.program.relative_name(site.weights["up"].fqn)

        def fill(new: nn.Linear, layer: nn.Module) -> None:
            new.weight.copy_(layer.get_parameter(name))

        path = edit.module("twin", lambda: nn.Linear(4, 8, bias=False), fill)
        (up,) = edit.program.readers(site.weights["up"].fqn)
        edit.replace(up, edit.call(torch.add, up, edit.call(path, site.values["in"].node)))


@dataclass(frozen=True)
class Halved(gatecc.Rewrite):
    """The branch is half of what goes in: its two layers are not needed, one of them leaves as two parameters."""

    name = "halved"
    keep: bool = False

    def contract(self) -> Contract:
        return changes_function()

    def reads(self) -> tuple[str, ...]:
        return ("in", "out")

    def rewrite(self, site: Site, edit: Editor) -> None:
        given, out = (site.values[name].node for name in ("in", "out"))
        new = edit.call(torch.mul, given, 0.5)
        edit.replace(out, edit.call(torch.add, new, out) if self.keep else new)
        edit.discard(out, inside=True)
        up, down = (site.weights[name] for name in ("up", "down"))
        for fqn in (up.fqn.removesuffix(".weight"), down.fqn, cast("str", down.bias)):
            edit.drop(fqn)


@dataclass(frozen=True)
class Experts(gatecc.Rewrite):
    """The rows of the first layer as parameters of two experts; the function stays."""

    name = "experts"

    def contract(self) -> Contract:
        return exact()

    def rewrite(self, site: Site, edit: Editor) -> None:
        weight = site.weights["up"].fqn
        (product,) = edit.program.readers(weight)
        first, second = edit.split(weight, (3, 5), name="rows")
        edit.replace(product, edit.call(_both, product.args[0], first, second, product.args[2]))
        edit.discard(product)


def _both(x: Tensor, first: Tensor, second: Tensor, bias: Tensor) -> Tensor:
    return torch.cat([F.linear(x, first), F.linear(x, second)], -1) + bias


def _same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two models have the same state dict, in the same order."""
    a, b = one.state_dict(), other.state_dict()
    return list(a) == list(b) and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.fixture(scope="module")
def deep() -> Net:
    torch.manual_seed(0)
    return Net(12).eval()


@pytest.fixture(scope="module")
def doubled(deep: Net) -> nn.Module:
    return gatecc.transform(deep, Doubled(gatecc.MLP[...]), (X,), verify=False)


def _expected(model: nn.Module, twins: nn.Module) -> Tensor:
    """``model`` computed by hand with the twins of another."""
    x = X
    for i in range(12):
        layer = cast("FF", model.get_submodule(f"layers.{i}"))
        twin = twins.get_parameter(f"layers.{i}.twin.weight")
        x = x + layer.down(torch.relu(layer.up(x) + F.linear(x, twin)))
    return x


def test_twelve_layers_that_share_a_graph_are_filled_from_their_own_weights(deep: Net, doubled: nn.Module) -> None:
    assert len(gatecc.last_report(doubled).graphs) == 1
    twins = [doubled.get_parameter(f"layers.{i}.twin.weight") for i in range(12)]
    for i, twin in enumerate(twins):
        assert torch.equal(twin, deep.get_parameter(f"layers.{i}.up.weight"))
    assert len({twin.data_ptr() for twin in twins}) == 12
    assert torch.allclose(doubled(X), _expected(deep, doubled), atol=1e-5)


def test_layers_of_one_graph_are_filled_from_their_own_weights_too() -> None:
    net = Net(2).eval()
    model = gatecc.transform(net, Doubled(gatecc.MLP[...]), (X,), scope="model", verify=False)
    for i in range(2):
        assert torch.equal(model.get_parameter(f"layers.{i}.twin.weight"), net.get_parameter(f"layers.{i}.up.weight"))


@pytest.fixture(scope="module")
def trained(doubled: nn.Module) -> nn.Module:
    """A copy with other numbers in each of the new modules."""
    model = copy.deepcopy(doubled)
    with torch.no_grad():
        for i in range(12):
            model.get_parameter(f"layers.{i}.twin.weight").mul_(i / 6)
    return model


def test_a_copy_of_twelve_layers_has_its_own(deep: Net, doubled: nn.Module, trained: nn.Module) -> None:
    assert torch.allclose(trained(X), _expected(deep, trained), atol=1e-5)
    assert torch.allclose(doubled(X), _expected(deep, doubled), atol=1e-5)
    assert not torch.allclose(doubled(X), trained(X), atol=1e-2)


def test_twelve_layers_are_loaded_each_its_own(deep: Net, trained: nn.Module, tmp_path: Path) -> None:
    gatecc.save(trained, tmp_path)
    loaded = gatecc.load(Net(12), tmp_path)
    assert _same(loaded, trained)
    assert torch.equal(loaded(X), trained(X))
    assert torch.equal(gatecc.revert(loaded)(X), deep(X))


def test_twelve_layers_are_compiled_each_its_own(deep: Net, trained: nn.Module) -> None:
    compiled = torch.compile(trained, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(X), _expected(deep, trained), atol=1e-5)
    with torch.no_grad():
        trained.get_parameter("layers.7.twin.weight").add_(1)
    try:
        assert torch.allclose(compiled(X), _expected(deep, trained), atol=1e-5)
    finally:
        with torch.no_grad():
            trained.get_parameter("layers.7.twin.weight").sub_(1)


@pytest.fixture(scope="module")
def net() -> Net:
    torch.manual_seed(1)
    return Net(2).eval()


@pytest.fixture(scope="module")
def halved(net: Net) -> nn.Module:
    return gatecc.transform(net, Halved(gatecc.MLP[...]), (X,))


@pytest.fixture(scope="module")
def experts(net: Net) -> nn.Module:
    return gatecc.transform(net, Experts(gatecc.MLP[...]), (X,))


def test_what_is_dropped_is_no_parameter_any_more(net: Net, halved: nn.Module) -> None:
    assert torch.allclose(halved(X), X * 1.5**2)
    assert not list(halved.parameters())
    assert not halved.state_dict()
    report = gatecc.last_report(halved)
    assert report.totals.parameters_before == sum(p.numel() for p in net.parameters())
    assert report.totals.parameters_after == 0
    for text in ("drop layers.[0-1].up", "drop layers.[0-1].down.weight"):
        assert text in str(report)
        assert text in report.to_html()
    assert report.rewrites[1].effects[0].path == "layers.1.up"


@pytest.mark.parametrize("made", ["halved", "experts"])
def test_other_calls_copies_and_casts_run_the_rewritten_graph(
    net: Net, made: str, request: pytest.FixtureRequest
) -> None:
    model: nn.Module = request.getfixturevalue(made)
    expected = X * 1.5**2 if made == "halved" else net(X)
    for other in (copy.deepcopy(model).train(), _pickled(model)):
        assert torch.allclose(other(X), expected, atol=1e-6)
        back = gatecc.revert(other)
        assert _same(back, net)
        assert torch.equal(back(X), net(X))
    wide = copy.deepcopy(model).double()
    assert torch.allclose(wide(X.double()), expected.double(), atol=1e-6)
    assert {p.dtype for p in gatecc.revert(wide).parameters()} == {torch.float64}


def _pickled(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("made", ["halved", "experts"])
@pytest.mark.parametrize("only_new", [False, True])
def test_a_checkpoint_holds_what_a_revert_needs(
    net: Net, made: str, only_new: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    model: nn.Module = request.getfixturevalue(made)
    gatecc.save(model, tmp_path, only_new=only_new)
    loaded = gatecc.load(net if only_new else Net(2), tmp_path)
    assert _same(loaded, model)
    assert torch.equal(loaded.eval()(X), model(X))
    assert _same(gatecc.revert(loaded), net)


def test_parts_are_trained_and_joined_again(net: Net, experts: nn.Module) -> None:
    assert [name for name, _ in experts.named_parameters()][:5] == [
        "layers.0.up.bias",
        "layers.0.down.weight",
        "layers.0.down.bias",
        "layers.0.rows.0",
        "layers.0.rows.1",
    ]
    assert torch.allclose(experts(X), net(X), atol=1e-6)
    model = copy.deepcopy(experts)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(X).square().sum().backward()
    optimizer.step()
    parts = [model.get_parameter(f"layers.1.rows.{i}").detach() for i in range(2)]
    assert not torch.equal(torch.cat(parts), net.get_parameter("layers.1.up.weight"))
    back = gatecc.revert(model)
    assert torch.equal(back.get_parameter("layers.1.up.weight"), torch.cat(parts))
    assert torch.allclose(back(X), model(X), atol=1e-6)


def test_rewritten_weights_are_compiled(net: Net, experts: nn.Module) -> None:
    compiled = cast("Any", torch.compile(experts, backend="eager", fullgraph=True))
    assert torch.allclose(compiled(X), net(X), atol=1e-6)


def test_a_call_that_is_no_graph_is_refused(halved: nn.Module) -> None:
    reasons = [state.python.refused for _, _, state in scopes(halved)]
    assert all("drop up" in reason for reason in reasons)
    with pytest.raises(gatecc.GateccError, match="drop up"):
        halved.get_submodule("layers.0")(cast("Any", object()))


def test_what_the_graph_still_reads_is_not_dropped(net: Net) -> None:
    before = copy.deepcopy(net)
    with pytest.raises(GraphError, match=r"layers\.0\.up\.weight"):
        gatecc.transform(net, Halved(gatecc.MLP[...], keep=True), (X,), inplace=True)
    assert _same(net, before)
    assert [name for name, _ in net.named_modules()] == [name for name, _ in before.named_modules()]


@pytest.mark.parametrize("rewrite", [Halved, Experts])
def test_a_weight_that_others_hold_stays(rewrite: type[gatecc.Rewrite]) -> None:
    tied = Net(2).eval()
    first, second = (cast("FF", layer) for layer in tied.layers)
    second.up.weight = first.up.weight
    with pytest.raises(GraphError, match="tied"):
        gatecc.transform(tied, rewrite(gatecc.MLP["layers.0"]), (X,))


def test_what_is_taken_out_meanwhile_stays_out_and_keeps_its_mode() -> None:
    layer = FF()
    layer.register_buffer("table", torch.ones(2))
    layer.up.eval()  # frozen by its user
    effects = [Drop("table"), Drop("drop"), Drop("up")]
    with evaluation(layer):
        for effect in effects:
            effect.apply(layer)
        assert not layer.training
    assert not dict(layer.named_buffers())
    with evaluation(layer):
        layer.down.training = True
    for effect in effects:
        effect.undo(layer)
    assert [m.training for m in (layer, layer.up, layer.drop, layer.down)] == [True, False, True, True]
    assert torch.equal(layer.get_buffer("table"), torch.ones(2))
