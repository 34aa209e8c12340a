"""Routing in training: losses by name, compiled, exported, checkpointed, wrapped; steps, heal and trainers."""

from __future__ import annotations

import copy
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.utils.checkpoint import checkpoint

import gatecc
from gatecc.errors import ArgumentError, MissingPackageError
from gatecc.ir.router import Router, RouterSpec
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.train import Tune, heal, lightning_callback, routing, trainer_callback


class MLP(nn.Module):
    """x: (B, N, 8) -> (B, N, 8)"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    """Two residual MLPs. x: (B, N, 8); with labels of its shape a dict with the mean squared error."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = MLP(), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.one(x)
        return x + self.two(x)


X = torch.randn(4, 5, 8, generator=torch.Generator().manual_seed(0))
SPEC = RouterSpec(
    choice="softmax_topk(2, T=linear(2.0, 1.0, 10))", init="random(0.5)", balance="aux(weight=0.5)+z(weight=0.1)+bias"
)


@pytest.fixture(scope="module")
def made() -> nn.Module:
    torch.manual_seed(0)
    return gatecc.transform(Net().eval(), Route("mlp[...]", SPEC, Copies(4)), (X,), verify=False)


@pytest.fixture
def model(made: nn.Module) -> nn.Module:
    return copy.deepcopy(made).train()


def router(model: nn.Module, name: str) -> Router:
    return cast("Router", model.get_submodule(f"{name}.router"))


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_losses_by_name(model: nn.Module) -> None:
    found = gatecc.aux_losses(model)
    assert {name: list(row) for name, row in found.items()} == {n: ["aux", "z"] for n in ("one.router", "two.router")}
    y: Tensor = model(X)
    first = router(model, "one")
    logits = X.flatten(0, 1) @ first.get_parameter("weight").T
    share = torch.zeros(20, 4).scatter(1, logits.topk(2).indices, 1.0).mean(0) / 2
    aux = 0.5 * 4 * (share * torch.softmax(logits / 2, -1).mean(0)).sum()
    z = 0.1 * logits.logsumexp(-1).square().mean()
    found = gatecc.aux_losses(model)["one.router"]
    torch.testing.assert_close(found, {"aux": aux.detach(), "z": z.detach()})
    y.square().mean().backward()
    again = copy.deepcopy(model)
    again.zero_grad()
    routing.scale_losses(again, 0.0)
    again(X).square().mean().backward()
    (added,) = torch.autograd.grad(aux + z, first.get_parameter("weight"))
    weight = "one.router.weight"
    torch.testing.assert_close(gradients(model)[weight], gradients(again)[weight] + added)


def test_evaluation_changes_nothing(model: nn.Module) -> None:
    model(X)
    before = gatecc.routing(model)["one.router"]
    model.eval()(X)
    assert gatecc.routing(model)["one.router"].tokens == before.tokens == 20


def test_figures_by_name(model: nn.Module) -> None:
    model(X)
    found = gatecc.routing(model)["two.router"]
    assert found.load.sum() == pytest.approx(1)
    assert found.importance.sum() == pytest.approx(1)
    assert 0 < found.entropy < 1
    assert found.dropped == 0
    assert found.passes == 1
    assert found.tokens == 20
    assert found.imbalance == float(found.load.max()) * 4
    numbers = routing.statistics(model, per_layer=True)
    rows = gatecc.routing(model).values()
    assert numbers["routing/entropy"] == pytest.approx(sum(r.entropy for r in rows) / 2)
    assert numbers["routing/imbalance"] == max(r.imbalance for r in rows)
    assert numbers["routing/two.router/imbalance"] == found.imbalance
    assert numbers["routing/loss_aux"] == pytest.approx(sum(float(v["aux"]) for v in gatecc.aux_losses(model).values()))


def test_statistics_of_gates() -> None:
    gated = gatecc.transform(Net().eval(), gatecc.Gate("mlp[...].out", gatecc.GateSpec("in")), (X,), verify=False)
    assert routing.statistics(gated)["gates/open"] == pytest.approx(1.0)
    assert routing.statistics(gated)["gates/weight"] == 0


@pytest.mark.parametrize("how", ["compiled", "checkpointed", "exported"])
def test_the_same_in_every_form(model: nn.Module, how: str) -> None:
    plain = copy.deepcopy(model)
    plain(X).square().mean().backward()
    form: Any = model
    if how == "compiled":
        form = torch.compile(model, backend="aot_eager", fullgraph=True)
        y = form(X)
    elif how == "exported":
        form = torch.export.export(model, (X,)).module()
        y = form(X)
    else:
        y = cast("Tensor", checkpoint(model, X, use_reentrant=False))
    y.square().mean().backward()
    expected = gradients(plain)
    found = gradients(form)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name if how != "compiled" else f"_orig_mod.{name}"], gradient)
    torch.testing.assert_close(gatecc.aux_losses(form), gatecc.aux_losses(plain))


def test_compiled_once_for_all_temperatures_and_few_lengths(model: nn.Module) -> None:
    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    with torch.no_grad():
        for length in (5, 6, 7, 9):
            compiled(torch.randn(4, length, 8))
            routing.step(model)
            routing.scale_losses(model, 0.5)
    assert len(graphs) <= 2


def test_a_step_moves_everything_once(model: nn.Module) -> None:
    for _ in range(2):
        model(X)
    first = router(model, "one")
    counts = first.counts.clone()
    assert counts.sum() == 80
    routing.step(model)
    assert torch.equal(first.get_buffer("expert_bias"), 1e-3 * torch.sign(20 - counts))
    assert float(first.get_buffer("temperature")) == pytest.approx(1.9)
    routing.step(nn.Linear(1, 1))  # nothing to do


@pytest.fixture
def group() -> Iterator[None]:
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("group")
def test_under_ddp(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def twice(tensor: Tensor) -> None:  # another process that chose the first expert alone
        tensor += torch.tensor([1000.0, 0.0, 0.0, 0.0]).repeat(2)

    monkeypatch.setattr(dist, "all_reduce", twice)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(X).square().mean().backward()
    assert list(gatecc.aux_losses(wrapped)) == ["one.router", "two.router"]
    assert gatecc.routing(wrapped)["one.router"].tokens == 20
    routing.step(wrapped)
    assert router(model, "one").get_buffer("expert_bias").tolist() == pytest.approx([-1e-3, 1e-3, 1e-3, 1e-3])


def test_scales_need_a_loss() -> None:
    with pytest.raises(ArgumentError, match="no router"):
        routing.scale_losses(nn.Linear(1, 1), 0.5)
    assert gatecc.aux_losses(nn.Linear(1, 1)) == {}


def test_heal_steps_by_itself(model: nn.Module) -> None:
    def loss(y: Tensor, batch: Tensor) -> Tensor:
        return y.square().mean()

    heal(model, None, [X, X + 1], tune=Tune(steps=3, loss=loss, accumulate=2), progress=False)
    assert float(router(model, "two").get_buffer("temperature")) == pytest.approx(1.7)
    assert router(model, "two").get_buffer("loss_scale") == 0.5
    assert gatecc.routing(model)["two.router"].passes == 2


class WithLoss(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.inner(x) - labels).square().mean()}


def test_in_a_trainer_of_transformers(model: nn.Module, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    data: Any = [{"x": X[i % 4], "labels": X[i % 4]} for i in range(12)]
    args = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=2, gradient_accumulation_steps=2, num_train_epochs=1,
        logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(WithLoss(model), args, train_dataset=data, callbacks=[trainer_callback()])
    trainer.train()
    assert trainer.state.global_step == 3
    one = router(model, "one")
    assert float(one.get_buffer("temperature")) == pytest.approx(1.7)
    assert one.get_buffer("loss_scale") == 0.5
    assert one.get_buffer("routed")[1] == 2
    logged = [row["routing/entropy"] for row in trainer.state.log_history if "loss" in row]
    assert len(logged) == 3
    assert all(0 < value < 1 for value in logged)


def test_in_lightning(model: nn.Module, tmp_path: Any) -> None:
    import lightning

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Tensor) -> Tensor:
            return self.inner(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
        callbacks=[lightning_callback(per_layer=True)],
    )  # fmt: skip
    trainer.fit(Task(), torch.utils.data.DataLoader(cast("Any", X.repeat(2, 1, 1)), batch_size=2))
    one = router(model, "one")
    assert float(one.get_buffer("temperature")) == pytest.approx(1.8)
    assert one.get_buffer("loss_scale") == 0.5
    assert one.get_buffer("routed")[1] == 2
    assert "routing/inner.one.router/entropy" in trainer.callback_metrics


@pytest.mark.parametrize(
    ("names", "make"),
    [(("transformers",), trainer_callback), (("lightning.pytorch", "pytorch_lightning"), lightning_callback)],
)
def test_a_missing_package_is_named(names: tuple[str, ...], make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in names:
        monkeypatch.setitem(sys.modules, name, cast("Any", None))
    with pytest.raises(MissingPackageError, match="is not installed"):
        make()
