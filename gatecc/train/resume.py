"""Resume: the whole state of a healing run in a folder, written so that it is there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatecc.capture.tree import decode, encode
from gatecc.errors import CheckpointError
from gatecc.ir.store import read_head, read_tensors, write
from gatecc.train.ranks import Ranks, placed, placed_state, whole

HEAD = "heal.json"
Stored = tuple[dict[str, Any], dict[str, Tensor]]


@dataclass
class Folder:
    """Where a run keeps itself; ``settings`` are those of its stages.

    A resumed run has the same, but for what is still to come: the steps of the stage that it is in, as long as they
    are no fewer than were done, and the stages after it.
    """

    path: str | os.PathLike[str]
    settings: list[dict[str, str]]
    ranks: Ranks = field(default_factory=Ranks)

    def save(self, state: dict[str, Any], modules: Mapping[str, nn.Module], optimizers: Sequence[Optimizer]) -> None:
        """Write a state, and the whole tensors of some modules and of the optimizers, once. Raises CheckpointError."""
        extra: dict[str, Tensor] = {}
        values = whole({**state, "optimizers": [o.state_dict()["state"] for o in optimizers]})
        held = whole({k: {n: t.detach() for n, t in tensors_of(m).items()} for k, m in modules.items()})
        if self.ranks.first:
            self._write(encode(values, extra), held, extra)
        self.ranks.wait()

    def _write(self, state: Any, held: Mapping[str, Mapping[str, Tensor]], extra: Mapping[str, Tensor]) -> None:
        data = {"format": 1, "settings": self.settings, "state": state}
        tensors = {f"{k}:{n}": t.cpu() for k, of_module in held.items() for n, t in of_module.items()}
        sets = {"weights": tensors, "state": {n: t.detach().cpu() for n, t in extra.items()}}
        write(self.path, HEAD, data, {s: {n: t.contiguous().clone() for n, t in v.items()} for s, v in sets.items()})

    def read(self) -> Stored | None:
        """The state in the folder and the modules' tensors; None if no run was kept there. Raises CheckpointError."""
        if not (Path(self.path) / HEAD).exists():
            self.ranks.same_folder(None, self.path)
            return None
        data = read_head(self.path, HEAD)
        try:
            state = decode(data["state"], read_tensors(self.path, data, "state"))
            other = _differences(data["settings"], self.settings, int(state["stage"]), int(state["step"]))
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CheckpointError("this is no state of a healing run", where=str(self.path), found=repr(e)) from e
        self.ranks.same_folder((int(state["stage"]), int(state["step"])), self.path)
        if other:
            raise CheckpointError(
                "the folder holds another healing run",
                where=str(self.path),
                found="; ".join(f"{name} was {had}" for name, had, _ in other),
                expected="; ".join(f"{name} is {asked}" for name, _, asked in other),
                do="resume with what it was begun with (more steps continue it), or choose another folder",
            )
        return cast("dict[str, Any]", state), read_tensors(self.path, data, "weights")


def _differences(
    had: Sequence[Mapping[str, str]], asked: Sequence[Mapping[str, str]], stage: int, step: int
) -> list[tuple[str, str, str]]:
    """The settings that keep a run from going on with others: their name, what was and what is asked for.

    ``stage`` and ``step`` are how far the run got.
    """
    found: list[tuple[str, str, str]] = []
    for number, (old, new) in enumerate(zip_longest(had, asked, fillvalue=None)):
        if old is None or new is None or old.get("stage") != new.get("stage"):
            kind = [None if x is None else x.get("stage") for x in (old, new)]
            if number <= stage or None not in kind:
                found.append((f"stage {number + 1}", str(kind[0]), str(kind[1])))
            break
        rows = [(key, old.get(key, "nothing"), new.get(key, "nothing")) for key in {**old, **new}]
        ahead = number > stage  # it has not begun
        for key, was, wanted in rows:
            longer = key == "steps" and number == stage and int(wanted) >= step
            if was != wanted and not ahead and not longer:
                done = f" ({step} done)" if key == "steps" and number == stage else ""
                found.append((f"{new['stage']}.{key}", was + done, wanted))
    return found


def load_tensors(name: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy what `Folder.save` kept of a module back into it. Raises CheckpointError if names or shapes differ."""
    own = tensors_of(module)
    kept = {n.removeprefix(f"{name}:"): t for n, t in tensors.items() if n.startswith(f"{name}:")}
    other = sorted(own.keys() ^ kept.keys()) or [n for n in own if own[n].shape != kept[n].shape]
    if other:
        raise CheckpointError("it belongs to another model", where=name, found=f"{other[0]} differs")
    with torch.no_grad():
        for key, tensor in own.items():
            tensor.copy_(placed(kept[key], tensor))


def load_optimizers(optimizers: Sequence[Optimizer], states: Sequence[Mapping[int, Any]]) -> None:
    """Put back what each optimizer knows of its parameters; groups and rates are the run's."""
    for optimizer, state in zip(optimizers, states, strict=True):
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        optimizer.load_state_dict({**optimizer.state_dict(), "state": placed_state(state, parameters)})


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, tied ones once."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def settings_of(stage: Any) -> dict[str, str]:
    """The fields of a stage as text; functions by their name."""
    return {"stage": type(stage).__name__} | {f.name: _text(getattr(stage, f.name)) for f in fields(stage)}


def _text(value: Any) -> str:
    return getattr(value, "__qualname__", type(value).__name__) if callable(value) else repr(value)
