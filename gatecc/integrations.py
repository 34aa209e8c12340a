"""Integrations: what other libraries call while they train or save a rewritten model. Needs transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from gatecc.checkpoint.pretrained import write_recipe
from gatecc.checkpoint.write import RECIPE
from gatecc.errors import CheckpointError, MissingPackageError
from gatecc.transform import history

try:
    from transformers import TrainerCallback
except ImportError as e:
    raise MissingPackageError(
        "gatecc.integrations needs transformers", found=str(e), do="pip install 'gatecc[hf]'"
    ) from e


class SaveRecipe(TrainerCallback):
    """Writes the recipe into every checkpoint of a Trainer: ``Trainer(..., callbacks=[SaveRecipe()])``.

    A model of transformers writes it by itself, for the Trainer calls its ``save_pretrained``. Of any other module the
    Trainer saves a state dict alone; with this callback `gatecc.load(model, checkpoint_folder)` reads the checkpoint.

    Raises CheckpointError when training begins on a model that was not transformed.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        _check(kwargs["model"])

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and not (folder / RECIPE).exists():
            write_recipe(kwargs["model"], folder)


def _check(model: nn.Module) -> None:
    if not history(model):
        raise CheckpointError(
            "the model that is trained was not transformed: there is no recipe to save",
            found=type(model).__name__,
            do="pass what gatecc.transform returned; of a model with adapters, gatecc.save its base model once",
        )
