"""A scope behaves as the module that it replaces, with gates: against a reference that applies the gates in Python."""

from __future__ import annotations

import copy
import io
import pickle
import types
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc import MLP, Activation, Gate, GateSpec, Residual
from gatecc.errors import CallNotCapturedError, UnsupportedModelError
from gatecc.scope.state import scopes


class Mlp(nn.Module):
    """A feed-forward network with everything that a graph could bake in: dropout, an optional mask, a Python flag."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)
        self.drop = nn.Dropout(0.5)
        self.scale = 1.0

    def forward(self, x: Tensor, mask: Tensor | None = None, *, double: bool = False) -> Tensor:
        y = self.down(self.drop(F.gelu(self.up(x)))) * self.scale
        y = y if mask is None else y * mask
        return y * 2 if double else y


class Net(nn.Module):
    def __init__(self, width: int = 16, depth: int = 3) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp(width) for _ in range(depth)])

    def forward(self, x: Tensor, mask: Tensor | None = None, *, double: bool = False) -> Tensor:
        for layer in self.layers:
            x = x + layer(x, mask, double=double)
        return x


GATES = [Gate(MLP[...].out, GateSpec("in", "linear", "token", "sigmoid"))]


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 16)


@pytest.fixture
def gated(x: Tensor) -> nn.Module:
    """Three gated layers with random gates."""
    model = gatecc.transform(Net().eval(), GATES, (x,))
    for name, p in model.named_parameters():
        if ".gate." in name:
            nn.init.normal_(p)
    return model


def reference(gated: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
    """What the gated model must compute, with the gates applied in Python."""
    x, mask = args[0], kwargs.get("mask", args[1] if len(args) > 1 else None)
    for layer in gated.get_submodule("layers").children():
        y = Mlp.forward(cast("Mlp", layer), x, mask, double=kwargs.get("double", False))
        gate = layer.get_submodule("gate")
        x = x + y * gate(y, x)
    return x


def same(gated: nn.Module, *args: Any, **kwargs: Any) -> bool:
    """Whether the model equals its reference on a call, from the same random state."""
    torch.manual_seed(1)
    expected = reference(gated, *args, **kwargs)
    torch.manual_seed(1)
    return torch.allclose(expected, gated(*args, **kwargs), atol=1e-6)


@pytest.mark.parametrize("size", [(4, 9), (1, 5), (1, 1), (2, 1), (7, 2)])
def test_any_batch_and_length(gated: nn.Module, size: tuple[int, int]) -> None:
    assert same(gated, torch.randn(*size, 16))


def test_none_against_tensor_is_never_ignored(gated: nn.Module, x: Tensor) -> None:
    mask = (torch.arange(5) > 2).float()[None, :, None].expand(2, 5, 1)
    assert same(gated, x, mask)
    assert same(gated, x, None)
    assert same(gated, x, mask=mask)
    assert not torch.equal(gated(x, mask), gated(x))


def test_a_python_constant_makes_another_variant(gated: nn.Module, x: Tensor) -> None:
    assert same(gated, x, double=True)
    assert same(gated, x, double=False)


def test_another_dtype(gated: nn.Module, x: Tensor) -> None:
    assert same(copy.deepcopy(gated).double(), x.double())


def test_train_and_eval_have_graphs_of_their_own(gated: nn.Module, x: Tensor) -> None:
    gated.train()
    assert same(gated, x)
    first, second = gated(x), gated(x)
    assert not torch.equal(first, second), "dropout is live"
    gated.eval()
    assert torch.equal(gated(x), gated(x))


def test_one_frozen_submodule(gated: nn.Module, x: Tensor) -> None:
    gated.train()
    gated.get_submodule("layers.1.drop").eval()
    assert same(gated, x)


def test_a_changed_attribute_is_not_stale(gated: nn.Module, x: Tensor) -> None:
    assert same(gated, x)
    layer: Any = gated.get_submodule("layers.1")
    layer.scale = 3.0
    assert same(gated, x)


class Private(Mlp):
    """Reads an attribute with an underscore and a tensor that is no buffer, and keeps a number for the next call."""

    def __init__(self, width: int) -> None:
        super().__init__(width)
        self._factor = 1.0
        self.table = torch.full((width,), 2.0)
        self._calls = 0

    def forward(self, x: Tensor, mask: Tensor | None = None, *, double: bool = False) -> Tensor:
        self._calls = self._calls + 1
        return super().forward(x, mask, double=double) * self._factor * self.table


def test_attributes_of_every_name_and_kind(x: Tensor) -> None:
    plain = Net(depth=1)
    plain.layers[0] = Private(16)
    gated = gatecc.transform(plain.eval(), GATES, (x,))
    kept = scopes_entries(gated)
    gated(x)
    assert scopes_entries(gated) == kept, "what the forward writes itself is no new kind of call"
    assert torch.allclose(copy.deepcopy(gated)(x), plain(x), atol=1e-6), "its tensor is another one"
    for model in (gated, plain):
        vars(model.get_submodule("layers.0"))["_factor"] = 0.5
    assert torch.allclose(gated(x), plain(x), atol=1e-6)


def scopes_entries(model: nn.Module) -> int:
    return sum(len(entries) for _, _, state in scopes(model) for entries in state.family.entries.values())


def test_a_swapped_submodule_is_seen(gated: nn.Module, x: Tensor) -> None:
    class Doubled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    layer: Any = gated.get_submodule("layers.0")
    layer.up = Doubled(16, 32)
    assert same(gated, x)


def test_hooks_inside_a_scope_run(gated: nn.Module, x: Tensor) -> None:
    seen: list[object] = []
    handle = gated.get_submodule("layers.0.up").register_forward_pre_hook(lambda m, a: seen.append(a))
    assert same(gated, x)
    assert seen
    handle.remove()


def test_hooks_on_the_way_back_are_not_skipped(gated: nn.Module, x: Tensor) -> None:
    seen: list[Any] = []
    gated.get_submodule("layers.0.up").register_full_backward_pre_hook(lambda *a: seen.append(a))
    gated(x).sum().backward()
    assert seen


def test_parameters_are_read_live(gated: nn.Module, x: Tensor) -> None:
    doubled = {name: 2 * p for name, p in gated.named_parameters()}
    before = gated(x)
    other = torch.func.functional_call(gated, doubled, (x,))
    assert not torch.allclose(before, other)
    gated.load_state_dict(doubled, strict=False)
    assert torch.allclose(gated(x), other)


def test_deepcopy_is_independent(gated: nn.Module, x: Tensor) -> None:
    twin = copy.deepcopy(gated)
    assert torch.equal(twin(x), gated(x))
    with torch.no_grad():
        twin.get_parameter("layers.0.gate.weight").add_(1)
    assert not torch.equal(twin(x), gated(x))
    assert same(twin, x)


def test_pickle_and_torch_save(gated: nn.Module, x: Tensor) -> None:
    twin = pickle.loads(pickle.dumps(gated))
    assert torch.equal(twin(x), gated(x))
    buffer = io.BytesIO()
    torch.save(gated, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer, weights_only=False)(x), gated(x))


def test_class_and_names_stay(gated: nn.Module) -> None:
    plain = Net()
    layer = gated.get_submodule("layers.0")
    assert isinstance(layer, Mlp)
    assert type(layer).__name__ == "Mlp"
    assert set(plain.state_dict()) <= set(gated.state_dict())
    extra = set(gated.state_dict()) - set(plain.state_dict())
    assert extra == {f"layers.{i}.gate.{p}" for i in range(3) for p in ("weight", "bias")}


def test_layers_share_one_capture(x: Tensor) -> None:
    model = gatecc.transform(Net(depth=6).eval(), GATES, (x,))
    families = {id(state.family) for _, _, state in scopes(model)}
    assert len(families) == 1
    (pair,) = gatecc.last_report(model).graphs
    assert len(pair.scopes) == 6


def test_a_layer_that_reads_another_constant_does_not_share(x: Tensor) -> None:
    model = Net(depth=3).eval()
    odd: Any = model.layers[1]
    odd.scale = 0.5
    result = gatecc.transform(model, GATES, (x,))
    assert len({id(state.family) for _, _, state in scopes(result)}) == 2
    assert torch.allclose(result(x), model(x), atol=1e-6)


def test_export_runs_inline(gated: nn.Module, x: Tensor) -> None:
    auto = torch.export.Dim.AUTO
    program = torch.export.export(gated, (x,), dynamic_shapes=({0: auto, 1: auto},), strict=False)
    gates = [n for n in program.graph.nodes if n.target is torch.ops.aten.sigmoid.default]
    assert len(gates) == 3
    other = torch.randn(3, 8, 16)
    assert torch.allclose(program.module()(other), gated(other), atol=1e-6)


def test_export_of_a_call_that_was_never_made(gated: nn.Module, x: Tensor) -> None:
    fresh = pickle.loads(pickle.dumps(gated))  # variants are not pickled
    mask = torch.ones(2, 5, 1)
    program = torch.export.export(fresh, (x, mask), strict=False)
    assert sum(n.target is torch.ops.aten.sigmoid.default for n in program.graph.nodes) == 3
    assert torch.allclose(program.module()(x, mask), gated(x, mask), atol=1e-6)


def test_an_opaque_argument_takes_the_python_path(gated: nn.Module, x: Tensor) -> None:
    class Shade:
        def __rmul__(self, y: Tensor) -> Tensor:
            return y * 0.5

    assert same(gated, x, Shade())


def test_what_python_cannot_say_raises(x: Tensor) -> None:
    spec = GateSpec("self", "linear", "token", "sigmoid")
    gated = gatecc.transform(Net().eval(), [Gate(Activation[...].out, spec)], (x,))

    class Shade:
        def __rmul__(self, y: Tensor) -> Tensor:
            return y

    with pytest.raises(CallNotCapturedError, match=r"(?s)layers\.0.*Shade"):
        gated(x, Shade())


def test_revert_is_bitwise(x: Tensor) -> None:
    model = Net().eval()
    spec = GateSpec("in", granularity="channel", init="identity(how=fold)")
    gated = gatecc.transform(model, [Gate(MLP[...].hidden, spec)], (x,))
    assert not torch.equal(gated.get_parameter("layers.0.down.weight"), model.get_parameter("layers.0.down.weight"))
    plain = gatecc.revert(gated)
    assert torch.equal(plain(x), model(x))
    assert set(plain.state_dict()) == set(model.state_dict())
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in plain.state_dict().items())
    assert type(plain.get_submodule("layers.0")) is Mlp


def test_transform_twice(gated: nn.Module, x: Tensor) -> None:
    twice = gatecc.transform(gated, GATES, (x,))
    assert torch.allclose(twice(x), gated(x), atol=1e-6)
    assert {"layers.0.gate.weight", "layers.0.gate_1.weight"} <= set(twice.state_dict())
    plain = gatecc.revert(twice)
    assert not [n for n in plain.state_dict() if "gate" in n]


class Layered(nn.Module):
    """A residual around an MLP, in modules of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Joined() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class Joined(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = Mlp(16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x)


BRANCH = [Gate(Residual[...].skip, GateSpec("self", "linear", "token", "sigmoid"))]


@pytest.mark.parametrize("order", [(BRANCH, GATES), (GATES, BRANCH), (GATES, BRANCH, GATES), (BRANCH, GATES, GATES)])
def test_transforms_at_different_depths_all_act(x: Tensor, order: tuple[list[Gate], ...]) -> None:
    """A scope inside another one: the outer runs as one graph, in which the inner one has to be."""
    plain = Layered().eval()
    model = plain
    for rewrites in order:
        model = gatecc.transform(model, rewrites, (x,))
    before = model(x)
    assert torch.allclose(before, plain(x), atol=1e-6)
    gates = [p for n, p in model.named_parameters() if n.endswith("bias") and ".gate" in n]
    assert len(gates) == 2 * len(order)
    for gate in gates:
        with torch.no_grad():
            gate.fill_(1.0)
            assert not torch.allclose(model(x), before, atol=1e-3)
            gate.fill_(0.0)
    assert torch.equal(gatecc.revert(model)(x), plain(x))


def test_a_transformed_model_has_the_sites_that_it_had(x: Tensor) -> None:
    """The graph of a scope hides which modules it runs, and gates on a join hide the join."""
    model = Layered().eval()
    gated = gatecc.transform(model, BRANCH, (x,))
    assert gatecc.inspect(gated, (x,)).sites == gatecc.inspect(model, (x,)).sites
    assert {name for name, _, _ in scopes(gatecc.transform(gated, GATES, (x,)))} == {"layers.0", "layers.1"}


def test_a_forward_on_the_instance_does_not_hide_the_gates(x: Tensor) -> None:
    """Monkey patches: what the class defines never runs, so that the scope has to be the module around."""
    model = Net(depth=2).eval()
    layer = cast("Mlp", model.layers[0])
    layer.forward = types.MethodType(lambda self, *a, **k: Mlp.forward(self, *a, **k), layer)
    gated = gatecc.transform(model, GATES, (x,))
    before = gated(x)
    nn.init.constant_(gated.get_parameter("layers.0.gate.bias"), 3.0)
    assert not torch.allclose(gated(x), before)
    model.forward = types.MethodType(Net.forward, model)  # the class's own: taken away, for accelerate leaves such
    assert torch.allclose(gatecc.transform(model, GATES, (x,))(x), model(x), atol=1e-6)
    model.forward = types.MethodType(lambda self, *a, **k: Net.forward(self, *a, **k), model)
    with pytest.raises(UnsupportedModelError, match="forward of its own"):
        gatecc.transform(model, GATES, (x,))


def test_inplace_failure_leaves_the_model_as_it_was(x: Tensor) -> None:
    model = Net().eval()
    before = {n: v.clone() for n, v in model.state_dict().items()}
    wrong = Gate(MLP[...].out, GateSpec("scores", "linear", "token", "sigmoid"))
    with pytest.raises(gatecc.GateccError):
        gatecc.transform(model, [*GATES, wrong], (x,), inplace=True)
    assert set(model.state_dict()) == set(before)
    assert all(torch.equal(v, before[n]) for n, v in model.state_dict().items())
    assert not list(scopes(model))
    assert all(type(m) is Mlp for m in model.layers)
