"""Routers under gradient scalers, FSDP2 and torch.compile: losses, figures and biases are those of a plain loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import gatecc
from gatecc.train import lightning_callback, routing, trainer_callback
from tests.train.test_routing import X, gradients, group, made, model, router

FIXTURES = (group, made, model)  # by their names


def loop(model: nn.Module, runs: Callable[..., Any], steps: int = 2) -> list[dict[str, Any]]:
    """A plain loop: what each step yields, what its routers did, and gradients as whole tensors."""
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    found: list[dict[str, Any]] = []
    for number in range(steps):
        optimizer.zero_grad()
        y = runs(X * (number + 1))
        y.square().mean().backward()
        grads = {n: g.full_tensor() if isinstance(g, DTensor) else g.clone() for n, g in gradients(model).items()}
        optimizer.step()
        figures = {n: [*r.load.tolist(), r.entropy, r.tokens] for n, r in gatecc.routing(model).items()}
        found.append({"y": y.detach(), "grads": grads, "losses": gatecc.aux_losses(model), "figures": figures})
        routing.step(model)
    return found


@pytest.mark.usefixtures("group")
def test_compiled_under_fsdp2(model: nn.Module) -> None:
    """What a router records in the graph that was compiled is what it records without."""
    sharded = copy.deepcopy(model)
    right = loop(model, model)
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,), mesh_dim_names=("compiled routers",)))
    for got, expected in zip(loop(sharded, torch.compile(sharded, backend="aot_eager")), right, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert len(right[0]["figures"]) == 2
    assert not torch.equal(right[0]["losses"]["one.router"]["aux"], right[1]["losses"]["one.router"]["aux"])
    for name in ("one", "two"):
        biases = [router(m, name).get_buffer("expert_bias") for m in (model, sharded)]
        assert biases[0].abs().max() > 0
        assert torch.equal(biases[0], biases[1])


def test_losses_are_scaled_as_the_loss_of_the_task(model: nn.Module) -> None:
    """After `unscale_` gradients are those of a loop without a scaler, those of balancing among them."""
    plain, forgotten = copy.deepcopy(model), copy.deepcopy(model)
    plain(X).square().mean().backward()
    for one, scale in ((model, 1024.0), (forgotten, 1.0)):
        optimizer = torch.optim.SGD(one.parameters(), 1.0)
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        routing.scale_losses(one, scale)
        scaler.scale(one(X).square().mean()).backward()
        scaler.unscale_(optimizer)
    right = gradients(plain)
    torch.testing.assert_close(gradients(model), right)
    name = "one.router.weight"
    assert not torch.allclose(gradients(forgotten)[name], right[name], rtol=1e-2)


def test_trainers_callback_reads_the_scaler(model: nn.Module) -> None:
    """transformers hands the optimizer of accelerate, which has the scaler, None where there is none."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for held, scale in ((scaler, 64.0), (None, 0.25)):
        optimizer = SimpleNamespace(scaler=held)
        args = SimpleNamespace(gradient_accumulation_steps=4)
        trainer_callback().on_step_begin(args, None, None, model=model, optimizer=optimizer)
        assert float(router(model, "one").get_buffer("loss_scale")) == scale


def test_in_lightning_with_a_scaler(model: nn.Module, tmp_path: Any) -> None:
    import lightning
    from lightning.pytorch.plugins import MixedPrecision

    class Task(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def training_step(self, batch: Tensor) -> Tensor:
            return self.inner(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), 1e-3)

    precision = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=128.0))
    trainer = lightning.Trainer(
        max_epochs=1, accumulate_grad_batches=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, plugins=[precision],
        callbacks=[lightning_callback()],
    )  # fmt: skip
    trainer.fit(Task(), torch.utils.data.DataLoader(cast("Any", X), batch_size=2))
    one = router(model, "one")
    assert float(one.get_buffer("loss_scale")) == 64.0
    assert float(one.get_buffer("temperature")) == pytest.approx(1.9)
