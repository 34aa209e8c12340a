"""Store: a folder of one JSON head and the safetensors files that it names, replaced as one.

The head is moved into place last, and the files of the head before it are removed only then. Whenever the writer stops,
a reader finds either everything of before or everything new; other files in the folder are never touched.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import uuid
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from gatecc.errors import CheckpointError
from gatecc.ir.files import write_atomic

_NAME = re.compile(r"[a-z]+(-[0-9a-f]{16})?\.safetensors")  # a head from elsewhere cannot name files outside its folder


def write(
    folder: str | os.PathLike[str], head: str, data: Mapping[str, Any], tensors: Mapping[str, dict[str, torch.Tensor]]
) -> None:
    """Write ``data`` to the file ``head`` and each set of tensors to a file beside it. Raises CheckpointError.

    A set called ``model`` goes to ``model.safetensors``, or, if that is taken, to ``model-DIGEST.safetensors``.
    """
    place = Path(folder)
    created = not place.exists()
    made: list[Path] = []
    try:
        place.mkdir(parents=True, exist_ok=True)
        old = _files_of(place / head)
        files = {stem: _write_tensors(place, stem, values, made) for stem, values in tensors.items()}
        write_atomic(place / head, json.dumps({**data, "files": files}, indent=1) + "\n")
    except BaseException as e:
        _discard(made)
        if created:
            with suppress(OSError):
                place.rmdir()
        if isinstance(e, OSError | SafetensorError | ValueError | RuntimeError):
            raise CheckpointError("it cannot be written", where=str(place), found=f"{type(e).__name__}: {e}") from e
        raise
    _discard(place / name for name in old - {f["name"] for f in files.values()})


def read_head(folder: str | os.PathLike[str], head: str) -> dict[str, Any]:
    """The JSON data of a store. Raises CheckpointError if there is none, or if it is no JSON object."""
    path = Path(folder) / head
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as e:
        raise CheckpointError("there is no checkpoint in this folder", where=str(folder), expected=head) from e
    except (OSError, ValueError) as e:
        raise CheckpointError("the file cannot be read", where=str(path), found=f"{type(e).__name__}: {e}") from e
    if not isinstance(data, dict):
        raise CheckpointError("the file is no JSON object", where=str(path), found=type(data).__name__)
    return cast("dict[str, Any]", data)


def read_tensors(folder: str | os.PathLike[str], data: Mapping[str, Any], stem: str) -> dict[str, torch.Tensor]:
    """One set of tensors that a head names, on the CPU. Raises CheckpointError if its file is missing or damaged."""
    name, digest = str(data["files"][stem]["name"]), str(data["files"][stem]["sha256"])
    path = Path(folder) / name
    if not _NAME.fullmatch(name):
        raise CheckpointError("the head names a file that is none of its own", where=str(folder), found=name)
    try:
        found = _digest(path)
        if found != digest:
            raise CheckpointError(
                "the file is damaged, or belongs to another checkpoint",
                where=str(path),
                found=f"sha256 {found[:16]}...",
                expected=f"sha256 {digest[:16]}...",
                do="copy the folder again as a whole",
            )
        return load_file(path)
    except (OSError, SafetensorError) as e:
        raise CheckpointError("the file cannot be read", where=str(path), found=f"{type(e).__name__}: {e}") from e


def _write_tensors(place: Path, stem: str, values: dict[str, torch.Tensor], made: list[Path]) -> dict[str, str]:
    temporary = place / f".{stem}.{uuid.uuid4().hex}"
    made.append(temporary)
    save_file(values, temporary, metadata={"format": "pt"})
    digest = _digest(temporary)
    final = place / f"{stem}.safetensors"
    if final.exists():
        final = place / f"{stem}-{digest[:16]}.safetensors"
    if not final.exists():
        made.append(final)
    os.replace(temporary, final)
    return {"name": final.name, "sha256": digest}


def _files_of(head: Path) -> set[str]:
    """The files that the head in place names; none if there is no head, or not one of ours."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        names = {str(f["name"]) for f in json.loads(head.read_text(encoding="utf-8"))["files"].values()}
        return {n for n in names if _NAME.fullmatch(n)}
    return set()


def _discard(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
