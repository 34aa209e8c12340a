"""Parts: what the data sheets of GPUs promise, for estimates. One for each target of the judge, by its name."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Part(NamedTuple):
    """A GPU. units: multiprocessors; bandwidth: bytes a second; half, single: FLOPs a second of matrix units, dense, on
    16-bit inputs and on float32 (in three TF32 products on NVIDIA); shared: bytes of shared memory of a multiprocessor.
    """

    name: str
    units: int
    bandwidth: float
    half: float
    single: float
    shared: int

    def rate(self, dtype: torch.dtype) -> float:
        """FLOPs a second on inputs of a dtype."""
        return self.single if dtype == torch.float32 else self.half


PARTS = {
    "sm_80": Part("A100 80 GB", 108, 2.04e12, 312e12, 52e12, 164 * 1024),
    "sm_90": Part("H100 SXM", 132, 3.35e12, 989e12, 165e12, 228 * 1024),
    "sm_100": Part("B200", 148, 8.0e12, 2250e12, 375e12, 228 * 1024),
    "sm_120": Part("RTX 5090", 170, 1.79e12, 209e12, 35e12, 100 * 1024),
    "gfx942": Part("MI300X", 304, 5.3e12, 1307e12, 163e12, 64 * 1024),
    "gfx950": Part("MI355X", 256, 8.0e12, 2516e12, 157e12, 160 * 1024),
}
