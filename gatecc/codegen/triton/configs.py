"""Configs: the sizes of blocks, warps and stages of kernels, as data. One JSON file per operator and make of GPU.

They are chosen ahead of time, by what compilers report (gatecc.codegen.judge) and by a static model, and never tried
out on a first call. ``$GATECC_KERNELS`` names a folder whose files, ``moe_ffn/nvidia.json``, replace entries of those
that come with gatecc.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from functools import lru_cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from gatecc.errors import ArgumentError

VARIABLE = "GATECC_KERNELS"
Config = Mapping[str, int]


def config(package: str, kernel: str, *variant: str, make: str | None = None) -> Config:
    """The entry of a kernel of a package (``gatecc.ops.moe_ffn.triton``) for a make of GPU, this machine's if
    none is named.

    ``variant`` are the keys below the kernel: the width of inputs, the load. Raises ArgumentError if a file that
    replaces entries has one that does not exist, or something that is no whole number.
    """
    found: Any = _table(package, make or family(), os.environ.get(VARIABLE))[kernel]
    for key in variant:
        found = found[key]
    return found


def family() -> str:
    """The make of GPU."""
    return "amd" if torch.version.hip else "nvidia"


def width(dtype: torch.dtype) -> str:
    """The key of inputs of a dtype."""
    return "32 bits" if dtype == torch.float32 else "16 bits"


@lru_cache
def _table(package: str, make: str, folder: str | None) -> dict[str, Any]:
    table = json.loads((files(package) / "configs" / f"{make}.json").read_text(encoding="utf-8"))
    if folder is None:
        return table
    path = Path(folder, package.split(".")[-2], f"{make}.json")
    return _replaced(table, json.loads(path.read_text(encoding="utf-8")), str(path)) if path.exists() else table


def _replaced(table: dict[str, Any], changes: Any, where: str) -> dict[str, Any]:
    """The table with entries replaced; it gains none."""
    if not isinstance(changes, dict):
        raise ArgumentError("a table of kernels is no object", where=where, found=repr(changes), expected="an object")
    found = dict(table)
    for key, change in changes.items():
        if key not in table:
            known = ", ".join(table)
            raise ArgumentError("a table of kernels names what does not exist", where=where, found=key, expected=known)
        nested = isinstance(table[key], dict)
        if not nested and (not isinstance(change, int) or change < 0):
            raise ArgumentError(
                "a size of a kernel is no number", where=where, found=f"{key}: {change!r}", expected="an integer"
            )
        found[key] = _replaced(table[key], change, f"{where}: {key}") if nested else change
    return found
