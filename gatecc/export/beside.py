"""Beside: the files of a transformers model that programs look for next to model.onnx: its config, its tokenizer.

optimum and sentence-transformers take a folder with model.onnx, config.json and the tokenizer's files;
sentence-transformers wants its list of modules, too. Nothing is fetched: what is not on this machine is left out.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import nn

from gatecc.errors import ArgumentError

CONFIG = "config.json"
_MODULES = "modules.json"
_SENTENCES = (_MODULES, "config_sentence_transformers.json", "sentence_bert_config.json")
_TOKENIZER = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
    "vocab.txt", "vocab.json", "merges.txt", "bpe.codes", "dict.txt", "spiece.model", "sentencepiece.bpe.model",
    "spm.model", "source.spm", "target.spm", "tokenizer.model", "tekken.json",
    "preprocessor_config.json", "processor_config.json", "image_processor_config.json",
)  # fmt: skip


def write_beside(model: nn.Module, folder: Path, tokenizer: Any = None) -> None:
    """Write the config of a model of transformers, and its tokenizer, into a new folder.

    ``tokenizer``: one of transformers, or a processor, or a folder that holds one; without it, the folder that the
    model was loaded from, if that is on this machine. Raises ArgumentError if there is no tokenizer in what was given.
    """
    folder.mkdir()
    config: Any = getattr(model, "config", None)
    if hasattr(config, "to_json_file"):
        written: Any = copy.deepcopy(config)
        written.architectures = written.architectures or [type(model).__name__]
        written.to_json_file(str(folder / CONFIG))
    if tokenizer is None:
        source = _loaded_from(config)
        if source is not None:
            _copy(source, folder)
    elif isinstance(tokenizer, str | os.PathLike):
        given = Path(tokenizer)
        if not _copy(given, folder):
            raise ArgumentError(
                "there is no tokenizer in this folder",
                found=str(given) if given.is_dir() else f"{given}, which is no folder",
                expected=f"one of {', '.join(_TOKENIZER[:2])}, vocab.txt and the like",
                do="tokenizer.save_pretrained(folder), or pass the tokenizer itself",
            )
    elif hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    else:
        raise ArgumentError(
            "this is no tokenizer", found=type(tokenizer).__name__,
            expected="a tokenizer or processor of transformers, or a folder that holds one",
        )  # fmt: skip


def _loaded_from(config: Any) -> Path | None:
    """The folder that a model was loaded from; None if it came from elsewhere."""
    name = getattr(config, "name_or_path", None) or getattr(config, "_name_or_path", None)
    return Path(name) if isinstance(name, str) and name and Path(name).is_dir() else None


def _copy(source: Path, folder: Path) -> bool:
    """Copy the files that are there; whether a tokenizer is among them."""
    for name in _SENTENCES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
    for part in _parts(source / _MODULES):
        if part.parts and not part.is_absolute() and ".." not in part.parts and (source / part).is_dir():
            shutil.copytree(source / part, folder / part, dirs_exist_ok=True)
    found = [name for name in _TOKENIZER if (source / name).is_file()]
    for name in found:
        shutil.copyfile(source / name, folder / name)
    return bool(found)


def _parts(modules: Path) -> Iterator[Path]:
    """The folders of the other modules of a sentence-transformers model: pooling, dense layers."""
    if not modules.is_file():
        return
    listed: list[dict[str, Any]] = json.loads(modules.read_text())
    yield from (Path(str(module.get("path", ""))) for module in listed)
