"""Callbacks: `gatecc.train.routing` in a trainer of transformers or Lightning, once per step of the optimizer."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn

from gatecc.errors import MissingPackageError
from gatecc.train.routing import aux_losses, scale_losses, statistics, step


def trainer_callback(*, per_layer: bool = False) -> Any:
    """A TrainerCallback for transformers' Trainer: ``Trainer(..., callbacks=[gatecc.train.trainer_callback()])``.

    After each step of the optimizer it calls `step`; the scale of balancing losses follows gradient accumulation and
    the scaler of half precision; `statistics` (``per_layer``: of each layer, too) join the logged figures.

    Raises MissingPackageError.
    """
    try:
        base: Any = importlib.import_module("transformers").TrainerCallback
    except ImportError as e:
        raise MissingPackageError("transformers is not installed", do="pip install 'gatecc[hf]'") from e

    class RoutingCallback(base):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            scaler = getattr(kwargs.get("optimizer"), "scaler", None)
            _scale(kwargs["model"], args.gradient_accumulation_steps, scaler)

        def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step(kwargs["model"])

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
            if logs is None or "loss" not in logs:  # an evaluation, or the summary at the end
                return
            found = statistics(kwargs["model"], per_layer=per_layer)
            logs.update(found)
            if state.log_history:
                state.log_history[-1].update(found)

    return RoutingCallback()


def lightning_callback(*, per_layer: bool = False) -> Any:
    """A Callback for Lightning: ``Trainer(callbacks=[gatecc.train.lightning_callback()])``. See `trainer_callback`.

    Raises MissingPackageError.
    """
    base = _lightning().Callback

    class RoutingCallback(base):
        def __init__(self) -> None:
            self.steps = 0

        def on_train_start(self, trainer: Any, pl_module: Any) -> None:
            self.steps = trainer.global_step

        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            _scale(pl_module, trainer.accumulate_grad_batches, scaler)

        def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == self.steps:  # a batch of an accumulation
                return
            self.steps = trainer.global_step
            pl_module.log_dict(statistics(pl_module, per_layer=per_layer))
            step(pl_module)

    return RoutingCallback()


def _lightning() -> Any:
    for name in ("lightning.pytorch", "pytorch_lightning"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise MissingPackageError(
        "lightning is not installed", do="pip install lightning; gatecc.train.routing.step(model) serves plain loops"
    )


def _scale(model: nn.Module, accumulated: int, scaler: Any) -> None:
    if aux_losses(model):
        scale_losses(model, (1.0 if scaler is None else float(scaler.get_scale())) / accumulated)
