"""Hooks on the inside of a scope: right tensors, once a call, at the right moment, and what they return is used.

The reference runs the same submodules in Python, so that torch itself calls the hooks, and applies the gate by hand.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.nn.utils import prune, spectral_norm, weight_norm
from torch.utils import _pytree as pytree
from torch.utils.flop_counter import FlopCounterMode

import gatecc
from gatecc import MLP, Gate, GateSpec, Residual
from gatecc.errors import CallNotCapturedError
from gatecc.scope.state import scopes


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        return self.down(F.relu(self.up(x))) * scale


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mlp, self.drop = nn.LayerNorm(8), Mlp(), nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.mlp(self.norm(x), scale=0.5))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Block() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


BRANCH = [Gate(Residual[...].branch, GateSpec("self", "linear", "channel", "sigmoid"))]
HIDDEN = [Gate(MLP[...].hidden, GateSpec("in", "linear", "channel", "sigmoid"))]


def after(module: nn.Module, hook: Any, **options: Any) -> Any:
    """register_forward_hook, whose type promises hooks a dict as output."""
    return module.register_forward_hook(hook, **options)


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".gate." in name:
            p.data = torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["auto", "model"])
def kept(request: pytest.FixtureRequest, x: Tensor) -> nn.Module:
    """Two layers whose residual branches are gated."""
    torch.manual_seed(0)
    return randomised(gatecc.transform(Net().eval(), BRANCH, (x,), scope=request.param))


@pytest.fixture
def gated(kept: nn.Module) -> Iterator[nn.Module]:
    """The same model for every test, so that captures are shared; hooks are taken off afterwards."""
    yield kept
    for module in (kept, *kept.modules()):
        for name in ("forward", "forward_pre", "backward", "backward_pre"):
            vars(module)[f"_{name}_hooks"].clear()


def reference(gated: nn.Module, x: Tensor) -> Tensor:
    """The gated model in Python. Its blocks are not called, their parts are."""
    for block in gated.get_submodule("layers").children():
        parts = dict(block.named_children())
        y = parts["drop"](parts["mlp"](parts["norm"](x), scale=0.5))
        x = x + y * parts["gate"](y, y)
    return x


Install = Callable[[nn.Module, list[Any]], Any]


def output(model: nn.Module, seen: list[Any]) -> None:
    after(model.get_submodule("layers.1.mlp"), lambda m, a, k, o: seen.append((a, k, o)), with_kwargs=True)


def changed_output(model: nn.Module, seen: list[Any]) -> None:
    after(model.get_submodule("layers.0.mlp"), lambda m, a, o: o * 3)
    after(model.get_submodule("layers.0.mlp.down"), lambda m, a, o: o + 1)
    after(model.get_submodule("layers.0.drop"), lambda m, a, o: seen.append(o))


def written_output(model: nn.Module, seen: list[Any]) -> None:
    def ablate(module: nn.Module, args: Any, output: Tensor) -> None:
        output[..., 3] = 0

    after(model.get_submodule("layers.0.norm"), ablate)


def changed_input(model: nn.Module, seen: list[Any]) -> None:
    model.get_submodule("layers.1.mlp").register_forward_pre_hook(lambda m, a: (a[0] + 1,))
    model.get_submodule("layers.1.mlp").register_forward_pre_hook(
        lambda m, a, k: seen.append((a, k)), with_kwargs=True, prepend=True
    )
    model.get_submodule("layers.1.mlp.up").register_forward_pre_hook(lambda m, a: a[0] * 2)


def gradients(model: nn.Module, seen: list[Any]) -> None:
    mlp = model.get_submodule("layers.1.mlp")
    mlp.register_full_backward_hook(lambda m, into, out: seen.append((into, out)))
    mlp.register_full_backward_hook(lambda m, into, out: (into[0] * 2,))
    model.get_submodule("layers.0.drop").register_full_backward_pre_hook(lambda m, out: (out[0] * 3,))


def tensor_hooks(model: nn.Module, seen: list[Any]) -> None:
    """What saliency maps do: a hook on the tensor that a forward hook sees."""
    after(model.get_submodule("layers.0.mlp"), lambda m, a, o: o.register_hook(seen.append) and None)


def identity_module(model: nn.Module, seen: list[Any]) -> None:
    """The dropout returns its very input, which is read before it, too."""
    after(model.get_submodule("layers.0.drop"), lambda m, a, o: o * 0)


def gate_module(model: nn.Module, seen: list[Any]) -> None:
    after(model.get_submodule("layers.1.gate"), lambda m, a, o: seen.append((a, o)))
    model.get_submodule("layers.1.gate").register_forward_pre_hook(lambda m, a: (a[0], a[1] * 2))
    after(model.get_submodule("layers.0.gate"), lambda m, a, o: o * 0.5)


INSTALLS = [
    output,
    changed_output,
    written_output,
    changed_input,
    gradients,
    tensor_hooks,
    identity_module,
    gate_module,
]


def run(call: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.clone().requires_grad_()
    y = call(x)
    (y * torch.linspace(-1, 1, 8)).sum().backward()
    assert x.grad is not None
    return y.detach(), x.grad


def same(a: Any, b: Any) -> bool:
    left, right = (pytree.tree_leaves(t) for t in (a, b))
    return len(left) == len(right) and all(
        torch.allclose(p, q, atol=1e-6) if isinstance(p, Tensor) else p == q for p, q in zip(left, right, strict=True)
    )


@pytest.mark.parametrize("install", INSTALLS, ids=lambda f: f.__name__)
def test_as_in_python(gated: nn.Module, x: Tensor, install: Install) -> None:
    plain = run(gated, x)
    seen: list[Any] = []
    install(gated, seen)
    expected = run(lambda x: reference(gated, x), x)
    right = list(seen)
    seen.clear()
    got = run(gated, x)
    assert same(got, expected)
    assert same(seen, right), "the hooks see the same, as often"
    quiet = install in (output, tensor_hooks)
    assert same(got, plain) is quiet, "hooks that change something do change it"


def test_later_calls_are_unharmed(gated: nn.Module, x: Tensor) -> None:
    before = gated(x)
    kept = entries(gated)
    handle = after(gated.get_submodule("layers.0.mlp"), lambda m, a, o: o * 0)
    gated(x)
    handle.remove()
    more = entries(gated)
    assert torch.equal(gated(x), before)
    after(gated.get_submodule("layers.0.mlp"), lambda m, a, o: o * 0)
    gated(x)
    assert entries(gated) == more > kept - 1, "both kinds of call are kept"


def entries(model: nn.Module) -> int:
    families = {id(s.family): s.family for _, _, s in scopes(model)}.values()
    return sum(len(found) for family in families for found in family.entries.values())


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_modes(gated: nn.Module, x: Tensor, mode: Callable[[], Any]) -> None:
    seen: list[Any] = []
    changed_output(gated, seen)
    with mode():
        expected, got = reference(gated, x), gated(x)
    assert torch.allclose(got, expected, atol=1e-6)
    assert len(seen) == 2
    assert torch.allclose(*seen, atol=1e-6)


def test_compiled_and_exported(gated: nn.Module, x: Tensor) -> None:
    for install in (changed_output, changed_input, gate_module):
        install(gated, [])
    expected = reference(gated, x)
    assert torch.allclose(torch.compile(gated, backend="eager", fullgraph=True)(x), expected, atol=1e-6)
    assert torch.allclose(torch.export.export(gated, (x,), strict=False).module()(x), expected, atol=1e-6)


def test_hooks_for_every_module(gated: nn.Module, x: Tensor) -> None:
    """Those of FlopCounterMode and of profilers."""
    seen: list[str] = []
    handle = torch_module.register_module_forward_hook(lambda m, a, o: seen.append(type(m).__name__))
    try:
        expected = reference(gated, x)
        inside = list(seen)
        seen.clear()
        got = gated(x)
    finally:
        handle.remove()
    assert torch.allclose(got, expected, atol=1e-6)
    assert [name for name in seen if name not in ("Block", "Net")] == inside
    with FlopCounterMode(display=False) as first:
        gated(x)
    with FlopCounterMode(display=False) as second:
        reference(gated, x)
    assert first.get_total_flops() == second.get_total_flops()


def test_another_kind_of_value_is_refused(gated: nn.Module, x: Tensor) -> None:
    after(gated.get_submodule("layers.0.norm"), lambda m, a, o: o[:, :2])
    with pytest.raises(CallNotCapturedError, match=r"(?s)layers\.\d\.norm.*another kind"):
        gated(x)


def test_hooks_from_before_the_transform(x: Tensor) -> None:
    seen: list[Any] = []
    plain = Net().eval()
    output(plain, seen)
    after(plain.layers[0].get_submodule("norm"), lambda m, a, o: o * 2)
    gated = gatecc.transform(plain, BRANCH, (x,))
    assert all(type(x) is Tensor for x in pytree.tree_leaves(seen) if isinstance(x, Tensor))
    seen.clear()
    assert torch.allclose(gated(x), plain(x), atol=1e-6)
    assert len(seen) == 2
    assert same(*seen)


def test_a_gate_in_the_middle_of_a_hooked_module(x: Tensor) -> None:
    """What goes into ``down`` is gated outside of it; what comes out of ``up`` is not yet."""
    gated = randomised(gatecc.transform(Net().eval(), HIDDEN, (x,)))
    plain = gated(x)
    mlp = gated.get_submodule("layers.0.mlp")
    seen: list[Tensor] = []
    after(mlp.get_submodule("up"), lambda m, a, o: seen.append(o))
    mlp.get_submodule("down").register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    assert torch.allclose(gated(x), plain, atol=1e-6)
    hidden = F.relu(seen[0])
    given = gated.get_submodule("layers.0.norm")(x)
    assert torch.allclose(mlp.get_submodule("gate")(hidden, given) * hidden, seen[1], atol=1e-6)


@pytest.mark.parametrize("make", [weight_norm, spectral_norm, lambda m: prune.random_unstructured(m, "weight", 0.5)])
def test_hooks_that_make_weights(x: Tensor, make: Callable[[nn.Module], Any]) -> None:
    """torch.nn.utils: the weight is made anew on each call, from parameters that train."""
    torch.manual_seed(0)
    before = Net().eval()
    late = randomised(gatecc.transform(before, BRANCH, (x,)))
    late(x)
    for model in (before, late):
        make(model.get_submodule("layers.1.mlp.down"))
    before(x)
    early = gatecc.transform(before, BRANCH, (x,))
    assert torch.allclose(early(x), before(x), atol=1e-6)
    for model in (randomised(early), late):
        down = model.get_submodule("layers.1.mlp.down")
        names = [name for name, _ in down.named_parameters() if name.startswith("weight_")]
        first = model(x)
        with torch.no_grad():
            down.get_parameter(names[-1]).add_(0.3)
        got = model(x)
        assert torch.allclose(got, reference(model, x), atol=1e-6)
        assert not torch.allclose(got, first, atol=1e-3)
        got.sum().backward()
        assert down.get_parameter(names[0]).grad is not None
        assert type(vars(down)["weight"]) is Tensor


def test_a_forward_put_on_a_submodule_later(gated: nn.Module, x: Tensor) -> None:
    before = gated(x)
    twin = copy.deepcopy(gated)
    norm = twin.get_submodule("layers.0.norm")
    norm.forward = lambda x: F.layer_norm(x, (8,)) + 5
    assert torch.allclose(twin(x), reference(twin, x), atol=1e-6)
    assert not torch.allclose(twin(x), before)
