"""What kernels are given besides numbers: operands with their strides, the table of chunks, the sizes of blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.configs import config, width
from gatecc.codegen.triton.sizes import block_of, cdiv

LEVELS = 5
CHUNK = 1 << LEVELS  # tokens

Kernel = Literal["scan", "plain_scan", "mix", "differentiate", "solve", "strengths", "delta_scan", "token"]


class Operand(NamedTuple):
    """A tensor (B, H / group, N, D) as kernels see it."""

    at: Tensor
    row: int
    head: int
    token: int
    channel: int
    group: int


class Chunks(NamedTuple):
    """table: (chunks, 3), row of the batch, first token, tokens; sequences: (S, 2), first chunk, chunks."""

    table: Tensor
    sequences: Tensor
    number: int


class Blocks(NamedTuple):
    """How much of a head a program takes, at most, how many warps run it, and, where it is not left to the assembler,
    how many registers a thread may have."""

    keys: int
    values: int
    warps: int
    registers: int = 0

    @property
    def options(self) -> dict[str, int]:
        """Of a launch."""
        return {"num_warps": self.warps, "num_stages": 1} | ({"maxnreg": self.registers} if self.registers else {})


def blocks(kernel: Kernel, dtype: torch.dtype, Dk: int, Dv: int) -> Blocks:
    """The blocks of a kernel for heads of these sizes, on this machine's make of GPU.

    ``plain_scan`` is ``scan`` without decays. ``state`` of an entry: elements of a state that a program holds, whose
    blocks have every key.
    """
    most = config(__package__ or "", kernel, width(dtype))
    keys, values = block_of(Dk, most["keys"]), block_of(Dv, most["values"])
    if "state" in most:
        values = max(16, min(values, most["state"] // keys))
    return Blocks(keys, values, most["warps"], most.get("registers", 0))


def operand(x: Tensor | None, heads: int) -> Operand | None:
    """x as the kernels of a problem with so many heads see it."""
    if x is None:
        return None
    row, head, token, channel = x.stride()
    # A single channel (one decay per head) is read for every channel.
    return Operand(x, row, head, token, 0 if x.size(3) == 1 else channel, heads // x.size(1))


@lru_cache(64)
def chunks(segments: tuple[tuple[int, int, int], ...], reverse: bool, device: torch.device) -> Chunks:
    """The chunks of sequences, those of one sequence in the order in which they run."""
    table: list[tuple[int, int, int]] = []
    sequences: list[tuple[int, int]] = []
    for row, first, length in segments:
        sequences.append((len(table), cdiv(length, CHUNK)))
        for done in range(0, length, CHUNK):
            start = first + length - 1 - done if reverse else first + done
            table.append((row, start, min(CHUNK, length - done)))
    place = torch.tensor(table, dtype=torch.int64).reshape(-1, 3)
    return Chunks(place.to(device), torch.tensor(sequences, dtype=torch.int64).to(device), len(table))
