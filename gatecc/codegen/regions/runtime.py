"""runtime: what generated files use."""

from __future__ import annotations

import torch

from gatecc.codegen.regions.blocks import Blocks, parts
from gatecc.codegen.triton.configs import family
from gatecc.codegen.triton.sizes import cdiv

__all__ = ["Blocks", "cdiv", "choose", "parts_of", "precision"]
_UNKNOWN = 1 << 30  # rows, where a compiler hands in a symbol


def choose(blocks: dict[str, list[tuple[int, Blocks]]], count: int | torch.SymInt) -> Blocks:
    """Those for so many rows, on this machine's make of GPU. A compiler may hand in a symbol: the largest."""
    choices = blocks[family()]
    if not isinstance(count, int):
        return choices[-1][1]
    return next((found for most, found in choices if count <= most), choices[-1][1])


def parts_of(count: int | torch.SymInt, block: int, programs: int) -> int:
    """Into how many parts rows are cut that are summed over, so that a GPU has work: none of less than four blocks."""
    return parts(family(), count if isinstance(count, int) else _UNKNOWN, block, programs)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three TF32 products, as exact as float32; 16-bit inputs as they are."""
    return "ieee" if torch.version.hip or dtype != torch.float32 else "tf32x3"
