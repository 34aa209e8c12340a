"""What kernels are given besides numbers: operands with their strides, the table of chunks, the sizes of blocks."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

LEVELS = 5
CHUNK = 1 << LEVELS  # tokens

Kernel = Literal["scan", "mix", "differentiate", "solve", "strengths", "delta_scan"]


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
    """How much of a head a program takes, at most, and how many warps run it."""

    keys: int
    values: int
    warps: int


# Chosen ahead of time by what compilers report: no register is spilled (gatecc.codegen.judge).
# For 16-bit inputs and for float32, whose products take three times the registers, on NVIDIA; for both on AMD. What is
# left is delta_scan: in float32 a few registers, and with 256 key channels hundreds.
BLOCKS: dict[Kernel, tuple[Blocks, Blocks, Blocks]] = {
    "scan": (Blocks(64, 64, 4), Blocks(32, 64, 4), Blocks(32, 64, 4)),
    "mix": (Blocks(64, 64, 8), Blocks(32, 64, 8), Blocks(32, 64, 4)),
    "differentiate": (Blocks(64, 64, 8), Blocks(16, 32, 4), Blocks(32, 64, 4)),
    "solve": (Blocks(32, 64, 4), Blocks(32, 64, 4), Blocks(32, 64, 4)),
    "strengths": (Blocks(64, 64, 4), Blocks(64, 64, 4), Blocks(64, 64, 4)),
    "delta_scan": (Blocks(256, 64, 8), Blocks(256, 32, 8), Blocks(256, 32, 4)),
}
STATE = (4096, 2048, 2048)  # elements of a state that a program of delta_scan holds, whose blocks have every key


def blocks(kernel: Kernel, dtype: torch.dtype, Dk: int, Dv: int) -> Blocks:
    """The blocks of a kernel for heads of these sizes: powers of two, 16 at least, as tensor cores ask for."""
    which = 2 if torch.version.hip else int(dtype == torch.float32)
    most = BLOCKS[kernel][which]
    keys, values = min(most.keys, _power(Dk)), min(most.values, _power(Dv))
    if kernel == "delta_scan":
        values = max(16, min(values, STATE[which] // keys))
    return Blocks(keys, values, most.warps)


def _power(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


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
        sequences.append((len(table), -(-length // CHUNK)))
        for done in range(0, length, CHUNK):
            start = first + length - 1 - done if reverse else first + done
            table.append((row, start, min(CHUNK, length - done)))
    place = torch.tensor(table, dtype=torch.int64).reshape(-1, 3)
    return Chunks(place.to(device), torch.tensor(sequences, dtype=torch.int64).to(device), len(table))
