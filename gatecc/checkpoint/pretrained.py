"""Pretrained: ``save_pretrained`` of a transformed model writes the recipe beside what its library writes."""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatecc.checkpoint.state import state_of
from gatecc.checkpoint.write import RECIPE, write
from gatecc.errors import CheckpointError
from gatecc.transform import AFTER, history

NAME = "save_pretrained"


class SavePretrained:
    """Stands for the method on one model, which it does not keep alive; copies and pickles of a model get their own."""

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        self.__doc__ = getattr(type(model), NAME).__doc__

    def __deepcopy__(self, memo: dict[int, Any]) -> SavePretrained:
        return SavePretrained(memo.get(id(self.model), self.model))

    def __reduce__(self) -> tuple[Any, ...]:
        return (SavePretrained, (self.model,))

    @property
    def model(self) -> nn.Module:
        """The model whose method this is."""
        model = self._model()
        assert model is not None  # the model holds this object, not the other way round
        return model

    def __call__(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> Any:
        """Save as the class does, and write the recipe. It is written first: weights without one load in silence."""
        if kwargs.get("push_to_hub") or (len(args) > 2 and args[2]):
            raise CheckpointError(
                "save_pretrained(push_to_hub=True) would upload the weights without the recipe",
                where=str(save_directory),
                do="model.push_to_hub(repo_id) uploads both",
            )
        main = kwargs.get("is_main_process", args[0] if args else True)
        before = _files(save_directory)
        if main:
            write_recipe(self.model, save_directory, kwargs.get("state_dict", args[1] if len(args) > 1 else None))
        try:
            return getattr(type(self.model), NAME)(self.model, save_directory, *args, **kwargs)
        except BaseException:
            if main and RECIPE not in before:  # nothing was there, and nothing of ours stays
                for name in _files(save_directory) - before:
                    if name == RECIPE or name.startswith(("new", "example")):
                        (Path(save_directory) / name).unlink(missing_ok=True)
            raise


def write_recipe(
    model: nn.Module, folder: str | os.PathLike[str], state_dict: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write recipe, new weights and synthetic example inputs into a folder to which another library saves the model.

    peft saves its adapters alone: `load` wants the model with these adapters then, and has what is new from the folder.
    """
    adapters_alone = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    write(model, folder, "new" if adapters_alone else "pretrained", state_of(model, state_dict))


def attach(model: nn.Module) -> None:
    """Let a model's own ``save_pretrained`` write the recipe too, as long as the model is transformed."""
    vars(model).pop(NAME, None)
    if history(model) and hasattr(type(model), NAME):
        vars(model)[NAME] = SavePretrained(model)


def _files(folder: str | os.PathLike[str]) -> set[str]:
    place = Path(folder)
    return {file.name for file in place.iterdir()} if place.is_dir() else set()


AFTER.append(attach)
