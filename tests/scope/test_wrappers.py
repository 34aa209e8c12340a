"""Wrappers of other libraries: the order that works trains the gates as they train alone, the other order is refused.

One process group of one, in memory. Losses and gradients are those of the same transformed model without wrappers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

import gatecc
from gatecc import MLP, Activation, Gate, GateSpec
from gatecc.errors import CallNotCapturedError, UnsupportedModelError
from gatecc.scope.state import scopes


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Mlp() for _ in range(2)])
        self.thrifty = False

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.thrifty else layer(x)) * scale
        return x


GATES = [Gate(MLP[...].out, GateSpec("self", "linear", "token", "sigmoid"))]


@pytest.fixture(scope="module")
def x() -> Tensor:
    return torch.randn(4, 3, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def plain() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def randomised(model: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if ".gate." in name:
            p.data = torch.randn(p.shape, generator=generator)
    return model


@pytest.fixture(scope="module")
def by_layer(plain: Net, x: Tensor) -> nn.Module:
    return randomised(gatecc.transform(plain, GATES, (x,)))


@pytest.fixture(scope="module")
def whole(plain: Net, x: Tensor) -> nn.Module:
    return randomised(gatecc.transform(plain, GATES, (x,), scope="model"))


@pytest.fixture(params=["by_layer", "whole"])
def gated(request: pytest.FixtureRequest) -> Any:
    """A copy, which shares the captures."""
    return copy.deepcopy(request.getfixturevalue(request.param))


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def gradients(model: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Of the loss of one step, by name without wrappers."""
    model.zero_grad()
    model(x).square().sum().backward()
    named = {n.removeprefix("module.").removeprefix("_forward_module."): p for n, p in model.named_parameters()}
    found = {n: p.grad for n, p in named.items() if p.grad is not None}
    assert len(found) == len(named)
    return {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in found.items()}


def close(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.allclose(a[n], b[n], atol=1e-5) for n in a)


# --- wrapped before: refused with the order -------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("kind", ["ddp", "data_parallel", "fully_shard", "fully_shard_layer", "fabric", "average"])
def test_wrapped_already(kind: str, by_layer: nn.Module, x: Tensor) -> None:
    from lightning.fabric import Fabric

    inner = Net().eval()
    model: nn.Module = inner
    if kind == "ddp":
        model = DistributedDataParallel(inner)
    elif kind == "data_parallel":
        model = nn.DataParallel(inner)
    elif kind == "average":
        model = AveragedModel(inner)
    elif kind == "fabric":
        model = Fabric(accelerator="cpu", devices=1).setup_module(inner)
    else:
        fully_shard(inner if kind == "fully_shard" else inner.layers[1], mesh=init_device_mesh("cpu", (1,)))
    for call in (
        lambda: gatecc.transform(model, GATES, (x,)),
        lambda: gatecc.inspect(model, (x,)),
        lambda: gatecc.revert(model),
    ):
        with pytest.raises(UnsupportedModelError, match=r"(?s)wrapped already.*do .*transform"):
            call()


# --- wrapped after ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("group")
def test_ddp(gated: nn.Module, x: Tensor) -> None:
    alone = gradients(gated, x)
    assert close(gradients(DistributedDataParallel(gated), x), alone)


def test_data_parallel(gated: nn.Module, x: Tensor) -> None:
    """Without a GPU it calls the module itself."""
    alone = gradients(gated, x)
    assert close(gradients(nn.DataParallel(gated), x), alone)


@pytest.mark.usefixtures("group")
def test_fully_shard(by_layer: nn.Module, x: Tensor) -> None:
    """On the scopes and on the model; a second transform and revert would not know the shards."""
    alone = gradients(by_layer, x)
    sharded = copy.deepcopy(by_layer)
    mesh = init_device_mesh("cpu", (1,))
    for layer in sharded.get_submodule("layers").children():
        fully_shard(layer, mesh=mesh)
    fully_shard(sharded, mesh=mesh)
    assert close(gradients(sharded, x), alone)
    with torch.no_grad():
        assert torch.allclose(sharded(x), by_layer(x), atol=1e-6)


@pytest.mark.usefixtures("group")
def test_shards_inside_of_a_whole_model_scope(whole: nn.Module, x: Tensor) -> None:
    """Never unsharded in silence: the Python path calls the layers, or the call is refused by name."""
    sharded = copy.deepcopy(whole)
    for layer in sharded.get_submodule("layers").children():
        fully_shard(layer, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(CallNotCapturedError, match=r"(?s)fully_shard on the submodule layers\.0.*scope=\"model\""):
        refusing(sharded)(x)


def refusing(model: nn.Module) -> nn.Module:
    """The model as if its rewrite could not be done in Python."""
    for _, _, state in scopes(model):
        state.python = replace(state.python, refused="an edit of an inner value")
    return model


def test_checkpointing(gated: Any, x: Tensor) -> None:
    """Around scopes it recomputes the gated layers; inside of one it would be lost, and is refused."""
    alone = gradients(gated, x)
    gated.thrifty = True
    if "" in [fqn for fqn, _, _ in scopes(gated)]:
        with pytest.raises(CallNotCapturedError, match=r"(?s)checkpointing inside a scope.*do .*scope=\"model\""):
            gated(x)
        with torch.no_grad():
            gated(x)  # nothing would be recomputed
        return
    assert close(gradients(gated, x), alone)


def test_fabric(gated: nn.Module, x: Tensor) -> None:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    alone = gradients(gated, x)
    optimizer = torch.optim.SGD(gated.parameters(), 0.1)
    model, optimizer = fabric.setup(gated, optimizer)
    optimizer.zero_grad()
    fabric.backward(model(x).square().sum())
    found = {n.removeprefix("_forward_module."): p.grad for n, p in model.named_parameters()}
    assert all(g is not None and torch.allclose(alone[n], g, atol=1e-5) for n, g in found.items())


def test_lightning_trainer(by_layer: nn.Module, x: Tensor, tmp_path: Path) -> None:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self, model: nn.Module) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: Tensor) -> Tensor:
            return self.model(batch).square().sum()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), 0.01)

    task = Task(copy.deepcopy(by_layer))
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=True,
        default_root_dir=tmp_path,
    )
    trainer.fit(task, torch.utils.data.DataLoader(x, batch_size=2))  # pyright: ignore[reportArgumentType]
    right = by_hand(by_layer, [x[:2], x[2:]], rate=0.01)
    assert all(torch.allclose(p, right.get_parameter(n), atol=1e-6) for n, p in task.model.named_parameters())


def by_hand(model: nn.Module, batches: list[Tensor], rate: float) -> nn.Module:
    model = copy.deepcopy(model).train()
    optimizer = torch.optim.SGD(model.parameters(), rate)
    for batch in batches:
        optimizer.zero_grad()
        model(batch).square().sum().backward()
        optimizer.step()
    return model


# --- accelerate -------------------------------------------------------------------------------------------------------


def accelerator(**options: Any) -> Any:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return Accelerator(cpu=True, **options)


def test_accelerate_bf16_and_accumulation(gated: Any, x: Tensor) -> None:
    right = copy.deepcopy(gated)
    for batch in (x, 2 * x):
        with torch.autocast("cpu", torch.bfloat16):
            y = right(batch)
        (y.float().square().sum() / 2).backward()
    runner = accelerator(mixed_precision="bf16", gradient_accumulation_steps=2)
    model, _ = runner.prepare(gated, torch.optim.SGD(gated.parameters(), 0.1))
    for batch in (x, 2 * x):
        with runner.accumulate(model):
            runner.backward(model(batch).square().sum())
    found = {n: p.grad for n, p in runner.unwrap_model(model).named_parameters()}
    for name, p in right.named_parameters():
        assert p.grad is not None
        assert torch.allclose(found[name], p.grad, rtol=1e-4, atol=1e-4), name


def test_what_accelerate_unwraps_is_the_transformed_model(gated: Any, plain: Net, x: Tensor) -> None:
    right = gated(x)
    assert inspect.signature(gated.forward) == inspect.signature(plain.forward)
    for _, module, _ in scopes(gated):
        assert inspect.unwrap(module.forward) == module.forward
        assert not hasattr(type(module).forward, "__wrapped__")
    runner = accelerator(mixed_precision="bf16")
    prepared = runner.prepare(gated)
    assert not torch.equal(prepared(x), right)
    assert torch.allclose(gatecc.revert(prepared)(x), runner.prepare(copy.deepcopy(plain))(x), atol=1e-6)
    back = runner.unwrap_model(prepared, keep_fp32_wrapper=False)
    assert torch.equal(back(x), right)
    assert torch.equal(copy.deepcopy(back)(x), right)
    assert torch.allclose(gatecc.transform(back, GATES, (x,))(x), right, atol=1e-6)
    assert torch.equal(gatecc.revert(back)(x), plain(x))


def test_hooks_of_accelerate(by_layer: nn.Module, whole: nn.Module, x: Tensor) -> None:
    """They stand in place of a module's forward, so a graph around it would skip them."""
    from accelerate import cpu_offload
    from accelerate.hooks import ModelHook, add_hook_to_module

    seen: list[int] = []

    class Count(ModelHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            seen.append(1)
            return args, kwargs

    model = copy.deepcopy(by_layer)
    add_hook_to_module(model.get_submodule("layers.0"), Count())
    assert torch.allclose(model(x), by_layer(x), atol=1e-6)
    assert len(seen) == 1
    model = copy.deepcopy(whole)
    add_hook_to_module(model.get_submodule("layers.0.up"), Count())
    assert torch.allclose(model(x), whole(x), atol=1e-6), "the Python path calls them"
    assert len(seen) == 2
    with pytest.raises(CallNotCapturedError, match=r"(?s)Count of accelerate on the submodule Linear"):
        refusing(model)(x)
    offloaded = cpu_offload(copy.deepcopy(by_layer), torch.device("cpu"))
    assert torch.allclose(offloaded(x), by_layer(x), atol=1e-6)
    whole_blocks = cpu_offload(refusing(copy.deepcopy(by_layer)), torch.device("cpu"), preload_module_classes=["Mlp"])
    assert torch.allclose(whole_blocks(x), by_layer(x), atol=1e-6)
    with pytest.raises(UnsupportedModelError, match="meta device"):
        gatecc.transform(cpu_offload(Net().eval(), torch.device("cpu")), GATES, (x,))


# --- other kinds of layers --------------------------------------------------------------------------------------------


def test_quantize_dynamic(gated: nn.Module, x: Tensor) -> None:
    quantize: Any = torch.ao.quantization.quantize_dynamic  # pyright: ignore[reportDeprecated]
    quantised = quantize(copy.deepcopy(gated), {nn.Linear})
    assert 0 < float((quantised(x) - gated(x)).abs().max()) < 0.2


@pytest.mark.parametrize("first", ["peft", "gatecc"])
def test_peft(first: str, plain: Net, x: Tensor) -> None:
    """Adapters before the transform or after it: the same gradients, in gates and adapters."""
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=["up", "down"], r=2, init_lora_weights=False)

    def adapted(model: nn.Module) -> nn.Module:
        torch.manual_seed(3)
        return inject_adapter_in_model(config, model)

    model = copy.deepcopy(plain)
    if first == "peft":
        model = adapted(model)
    spec = GateSpec("self", "linear", "token", "sigmoid")
    model = gatecc.transform(model, [Gate(Activation[...].out, spec)], (x,))
    if first == "gatecc":
        model = adapted(model)
    for name, p in model.named_parameters():
        p.requires_grad_("lora_" in name or ".gate." in name)
    randomised(model)
    got = model(x)
    right = x
    for layer in model.get_submodule("layers").children():
        y = F.relu(layer.get_submodule("up")(right))
        right = right + layer.get_submodule("down")(y * layer.get_submodule("gate")(y, y))
    assert torch.allclose(got, right, atol=1e-5)
    trained = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(got.square().sum(), trained)
    assert all(
        torch.allclose(a, b, atol=1e-4)
        for a, b in zip(found, torch.autograd.grad(right.square().sum(), trained), strict=True)
    )
