"""The first call of a kind looks like every later one, whatever state of torch the caller has switched on."""

from __future__ import annotations

import copy
import functools
import pickle
import random
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, cast

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, stack_module_state, vmap
from torch.nn.modules.module import register_module_forward_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import gatecc

X = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two encoder layers, recomputed in backward if asked for."""

    def __init__(self) -> None:
        super().__init__()
        layers = (nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(layers)
        self.reentrant: bool | None = None

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            again = self.reentrant is not None and self.training
            x = checkpoint(layer, x, use_reentrant=self.reentrant) if again else layer(x)
        return x


def _gated() -> Net:
    """A gated model in training mode that has no captures: a pickled scope leaves them behind."""
    return pickle.loads(_pickled())


@functools.cache
def _pickled() -> bytes:
    torch.manual_seed(0)
    gated = gatecc.transform(Net().eval(), "gated-attention", (X,))
    with torch.no_grad():
        for name, parameter in gated.named_parameters():
            if ".gate." in name:
                parameter.normal_()
    return pickle.dumps(gated.train())


class _Dispatched(TorchDispatchMode):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Functions(TorchFunctionMode):
    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.seen = seen

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@contextmanager
def _dispatched(seen: list[Any]) -> Generator[None]:
    with _Dispatched(seen):
        yield


@contextmanager
def _functions(seen: list[Any]) -> Generator[None]:
    with _Functions(seen):
        yield


@contextmanager
def _saved(seen: list[Any]) -> Generator[None]:
    def pack(x: Tensor) -> Tensor:
        seen.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield


@contextmanager
def _flops(seen: list[Any]) -> Generator[None]:
    with FlopCounterMode(display=False) as counter:
        yield
    seen.append(counter.get_total_flops())


@contextmanager
def _profiled(seen: list[Any]) -> Generator[None]:
    with torch.autograd.profiler.profile() as profile:
        yield
    events = cast("Any", profile).function_events
    seen.extend(event.name for event in events if event.name.startswith("aten::"))


@contextmanager
def _nodes(seen: list[Any]) -> Generator[None]:
    with torch.autograd.graph.node_creation_hook(lambda node: seen.append(node.name())):
        yield
    seen[:] = [name for name in seen if not name.endswith("AccumulateGrad")]  # made once for each parameter


@contextmanager
def _modules(seen: list[Any]) -> Generator[None]:
    handle = register_module_forward_hook(lambda module, args, output: seen.append(type(module).__name__))
    yield
    handle.remove()


@contextmanager
def _random(seen: list[Any]) -> Generator[None]:
    torch.manual_seed(1)
    random.seed(1)
    numpy.random.seed(1)
    yield
    seen += [float(torch.rand(())), random.random(), float(numpy.random.rand())]


@contextmanager
def _default_dtype(seen: list[Any]) -> Generator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def _deterministic(seen: list[Any]) -> Generator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def _under(context: Callable[[], Any]) -> Generator[None]:
    with context():
        yield


AMBIENT: dict[str, Callable[[list[Any]], Any]] = {
    "saved tensors": _saved,
    "dispatch mode": _dispatched,
    "function mode": _functions,
    "flops": _flops,
    "profiler": _profiled,
    "nodes": _nodes,
    "module hooks": _modules,
    "random": _random,
    "default dtype": _default_dtype,
    "deterministic": _deterministic,
    "inference": lambda seen: torch.inference_mode(),
    "no_grad": lambda seen: torch.no_grad(),
    "autocast": lambda seen: torch.autocast("cpu", torch.bfloat16),
    "anomaly": lambda seen: torch.autograd.detect_anomaly(check_nan=False),
    "default device": lambda seen: torch.device("meta"),
}
SILENT = {"default dtype", "deterministic", "inference", "no_grad", "autocast", "anomaly", "default device"}


@pytest.mark.parametrize("name", AMBIENT)
def test_first_and_second_call_look_the_same_to_observers(name: str) -> None:
    gated = _gated()
    seen: list[list[Any]] = [[], []]
    outputs: list[Tensor] = []
    for observed in seen:
        with AMBIENT[name](observed):
            outputs.append(gated(X))
    assert torch.equal(*outputs)
    assert seen[0] == seen[1]
    assert (name in SILENT) == (seen[0] == [])


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_training_step_runs_under_checkpointing(reentrant: bool) -> None:
    gated = _gated()
    x = X.clone().requires_grad_()
    grads: list[dict[str, Tensor]] = []
    for gated.reentrant in (reentrant, reentrant, None):  # the last one without checkpointing
        gated.zero_grad()
        gated(x).square().mean().backward()
        grads.append({n: p.grad.clone() for n, p in gated.named_parameters() if p.grad is not None})
    assert len(grads[0]) == len(list(gated.parameters()))
    for name in grads[0]:
        torch.testing.assert_close(grads[0][name], grads[2][name])
        torch.testing.assert_close(grads[1][name], grads[2][name])


def test_proofs_leave_no_casts_without_gradient_in_the_cache_of_autocast() -> None:
    grads: list[dict[str, Tensor]] = []
    gated = _gated()
    for _ in range(2):
        gated.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = gated(X).float().square().mean()
        loss.backward()
        grads.append({n: p.grad.clone() for n, p in gated.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() == dict(gated.named_parameters()).keys()
    assert all(torch.equal(grads[0][n], grads[1][n]) for n in grads[0])


class Decorated(Net):
    """A region that was made before any call, and so keeps the casts of weights whatever the call is under."""

    @torch.autocast("cpu", torch.bfloat16)  # pyright: ignore[reportUntypedFunctionDecorator]  # torch has no types for it
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).float()


def test_no_cast_of_a_weight_outlives_a_transform() -> None:
    plain = Decorated().eval()
    for keep in (False, True):  # in a transform, and in the first call of a kind
        gated = gatecc.transform(plain, "gated-attention", (X,), verify=not keep)
        with torch.no_grad():
            for p in gated.parameters():
                p.mul_(1.5)
        expected = copy.deepcopy(gated)(X)
        torch.testing.assert_close(gated(X), expected)
        gated(X).square().mean().backward()
        assert all(p.grad is not None for p in gated.parameters())


@pytest.mark.parametrize("inplace", [False, True])
def test_a_transform_under_inference_mode_trains(inplace: bool) -> None:
    model = Net().eval()
    with torch.inference_mode():
        inputs = (X.clone(),)
        gated = gatecc.transform(model, "gated-attention", inputs, inplace=inplace)
        gated.train()(X.clone())
    assert not any(t.is_inference() for t in (*gated.parameters(), *gated.buffers()))
    gated(X).square().mean().backward()
    assert all(p.grad is not None for p in gated.parameters())


def test_a_model_made_under_inference_mode_shows_its_sites_and_its_copy_trains() -> None:
    with torch.inference_mode():
        model = Net().eval()
        gated = gatecc.transform(model, "gated-attention", (X,))
    assert next(model.parameters()).is_inference()
    assert [site.kind for site in gatecc.inspect(model, (X,)).sites].count("attention") == 2
    gated(X).square().mean().backward()
    assert all(p.grad is not None for p in gated.parameters())
    with pytest.raises(gatecc.GateccError, match=r"made under torch\.inference_mode"):
        gatecc.transform(model, "gated-attention", (X,), inplace=True)


def test_doors_see_no_ambient_state() -> None:
    torch.manual_seed(0)
    model = Net().eval()
    seen: list[Any] = []
    with _dispatched(seen), _functions(seen), _saved(seen), _modules(seen), torch.inference_mode():
        report = gatecc.inspect(model, (X,))
        gated = gatecc.transform(model, "gated-attention", (X,))
        plain = gatecc.revert(gated)
    assert seen == []
    assert len([s for s in report.sites if s.kind == "attention"]) == 2
    assert not any(p.is_inference() for p in (*gated.parameters(), *plain.parameters()))


def test_functional_transforms_give_what_the_module_with_these_weights_gives() -> None:
    gated, again = _gated(), _gated()
    weights = {n: p.detach() for n, p in gated.named_parameters()}

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(gated, weights, (x,)).square().mean()

    got = grad(loss)(weights, X)
    again(X).square().mean().backward()
    for name, parameter in again.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad)

    of_each = vmap(grad(loss), (None, 0))(weights, X[:, None])
    for i, x in enumerate(X):
        again.zero_grad()
        again(x[None]).square().mean().backward()
        for name, parameter in again.named_parameters():
            torch.testing.assert_close(of_each[name][i], parameter.grad)

    bias = {"layers.1.linear2.bias": weights["layers.1.linear2.bias"]}
    jacobian = jacrev(lambda b: functional_call(gated, {**weights, **b}, (X,)).mean((0, 1)))(bias)
    for i, row in enumerate(jacobian["layers.1.linear2.bias"]):
        again.zero_grad()
        again(X).mean((0, 1))[i].backward()
        torch.testing.assert_close(row, again.get_parameter("layers.1.linear2.bias").grad)


def test_an_ensemble_of_weights_runs_batched() -> None:
    first, second = _gated(), _gated()
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.mul_(1.1)
    weights, buffers = stack_module_state([first, second])
    skeleton = _gated()
    got = vmap(lambda w, b: functional_call(skeleton, (w, b), (X,)))(weights, buffers)
    torch.testing.assert_close(got, torch.stack([first(X), second(X)]))
