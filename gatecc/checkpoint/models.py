"""Models: base models that libraries make from what they wrote themselves: a configuration, or a folder of weights."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file
from torch import nn

from gatecc.errors import CheckpointError
from gatecc.scope.state import base_class

LIBRARIES = ("transformers", "diffusers")  # a folder may have these imported; a class of others must be there already
INDEX = "model.safetensors.index.json"


def described(model: nn.Module, weights: str) -> dict[str, Any]:
    """What is written of a model so that its library can make it again; nothing for a class of no library."""
    cls = base_class(model)
    rows: dict[str, Any] = {"class": f"{cls.__module__}:{cls.__qualname__}"}
    config = getattr(model, "config", None)
    if not hasattr(cls, "_from_config") or not hasattr(config, "to_json_string"):
        return rows
    rows["buffers"] = {
        name: str(b.dtype).removeprefix("torch.")
        for name, b in model.named_buffers()
        if b.is_floating_point() and name not in model.state_dict()
    }
    rows["attention"] = getattr(config, "_attn_implementation", None)
    rows["dtype"] = str(getattr(model, "dtype", torch.float32)).removeprefix("torch.")
    if weights != "pretrained":
        rows["config"] = json.loads(cast("Any", config).to_json_string(use_diff=False))
        generation = getattr(model, "generation_config", None)
        rows["generation"] = None if generation is None else json.loads(generation.to_json_string(use_diff=False))
    return rows


def from_config(data: Mapping[str, Any], folder: object) -> nn.Module:
    """A base model with random weights, from the configuration that the checkpoint holds. Raises CheckpointError."""
    if "config" not in data:
        raise _no_model(data, folder)
    cls = _class(data, folder)
    config = cls.config_class.from_dict(data["config"])
    model = cls._from_config(config, **_options(data)).eval()
    if data.get("generation") is not None and hasattr(model, "generation_config"):
        model.generation_config = type(model.generation_config).from_dict(data["generation"])
    return _cast(model, data)


def from_folder(data: Mapping[str, Any], folder: str | os.PathLike[str]) -> nn.Module:
    """The base model that ``from_pretrained`` makes of a folder of ``save_pretrained``. Raises CheckpointError."""
    cls = _class(data, folder)
    if not hasattr(cls, "from_pretrained"):
        raise _no_model(data, folder)
    return _cast(_pretrained(cls, data, folder), data)


def _cast(model: nn.Module, data: Mapping[str, Any]) -> nn.Module:
    """Tables that no state dict holds in the dtypes that they had: ``.to(dtype)`` casts them, ``dtype=`` does not."""
    for name, dtype in data.get("buffers", {}).items():
        holder, _, leaf = name.rpartition(".")
        module = model.get_submodule(holder)
        if module._buffers.get(leaf) is not None:
            module._buffers[leaf] = module.get_buffer(leaf).to(getattr(torch, dtype))
    return model


def weights_in(model: nn.Module, data: Mapping[str, Any], folder: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of the base model in a folder that another library wrote. Raises CheckpointError.

    Through the library's own ``from_pretrained`` where there is one: names in the files may differ from the model's.
    """
    if hasattr(model, "from_pretrained") and (Path(folder) / "config.json").exists():
        return dict(_pretrained(base_class(model), data, folder).state_dict())
    return _raw(Path(folder))


def _raw(folder: Path) -> dict[str, torch.Tensor]:
    files = [folder / "model.safetensors"]
    if (folder / INDEX).exists():
        index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
        files = [folder / Path(name).name for name in sorted(set(index["weight_map"].values()))]
    found: dict[str, torch.Tensor] = {}
    for file in files:
        if file.exists():
            found |= load_file(file)
    other = folder / "pytorch_model.bin"
    if not found and other.exists():
        found = dict(torch.load(other, map_location="cpu", weights_only=True))
    if not found:
        raise CheckpointError(
            "the folder holds no weights", where=str(folder), expected=f"model.safetensors or {INDEX}"
        )
    return found


def _class(data: Mapping[str, Any], folder: object) -> Any:
    module, _, name = str(data.get("class", "")).partition(":")
    if module.partition(".")[0] in LIBRARIES and module not in sys.modules:
        try:
            __import__(module)
        except ImportError as e:
            raise CheckpointError(
                "the library of the model cannot be imported", where=str(folder), found=str(e), do="install it"
            ) from e
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    if found is None:
        raise _no_model(data, folder)
    return found


def _no_model(data: Mapping[str, Any], folder: object) -> CheckpointError:
    return CheckpointError(
        f"the folder does not say how to make a {data.get('model', 'model')}",
        where=str(folder),
        found=f"a model of class {data.get('class', 'unknown')}",
        expected="a model of transformers or diffusers, or a class that is imported and has from_pretrained",
        do="make the base model and pass it: gatecc.load(model, folder)",
    )


def _options(data: Mapping[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {}
    if data.get("dtype"):
        options["dtype"] = getattr(torch, str(data["dtype"]))
    if data.get("attention"):
        options["attn_implementation"] = data["attention"]
    return options


def _pretrained(cls: Any, data: Mapping[str, Any], folder: str | os.PathLike[str]) -> nn.Module:
    options = _options(data)
    if options and any(name in data["base"] for name in data["new"]):
        options["ignore_mismatched_sizes"] = True  # weights with new rows: they come from our own file
    try:
        with _quiet():
            return cls.from_pretrained(str(folder), **options)
    except (OSError, ValueError, RuntimeError, TypeError) as e:
        raise CheckpointError(
            "from_pretrained cannot read the folder", where=str(folder), found=f"{type(e).__name__}: {e}"[:400]
        ) from e


@contextmanager
def _quiet() -> Generator[None]:
    """Without the libraries' warnings about the new weights: we load these ourselves."""
    loggings = [sys.modules.get(f"{name}.utils.logging") for name in LIBRARIES]
    before = [(module, module.get_verbosity()) for module in loggings if module is not None]
    try:
        for module, _ in before:
            module.set_verbosity_error()
        yield
    finally:
        for module, level in before:
            module.set_verbosity(level)
