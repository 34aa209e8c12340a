"""The machine that the tests run on: which of the units that kernels are written for its CPU has."""

from __future__ import annotations

import functools
from pathlib import Path

FLAGS = {"AVX2": "avx2", "AVX-512": "avx512f", "AVX-512 bf16": "avx512_bf16", "AMX": "amx_bf16"}


@functools.cache
def units() -> tuple[str, ...]:
    """The names of the units, in the order of FLAGS; empty where /proc/cpuinfo does not tell."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ()
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    return tuple(name for name, flag in FLAGS.items() if flag in flags)
