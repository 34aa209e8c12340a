"""``gatecc::linear`` against torch's product on a CPU: ``python benchmarks/products.py [--check]``.

float32, one thread, in turn: products by linear layers, and by those of GPT-2 (weights stored as inputs x outputs). The
sizes are multiply-adds from 2^25 on, where the lowering `dense-products` begins on CPUs with AVX-512 of AMD. With
``ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2 ONEDNN_MAX_CPU_ISA=AVX2`` both libraries are held to AVX2.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from _table import Row, best_of, main

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F

from gatecc.ops.linear import smallest

SIZES = [  # rows, inputs, outputs
    (128, 256, 1024),
    (512, 256, 256),
    (512, 256, 1024),
    (512, 1024, 256),
    (1024, 256, 1024),
    (1024, 1024, 256),
    (2048, 256, 256),
    (32, 1024, 4096),
    (256, 1024, 4096),
]
LEAST = 0.98  # the noise aside


def repeated(product: Callable[..., object], operands: Sequence[torch.Tensor], times: int) -> Callable[[], object]:
    """A product so many times."""
    return lambda: [product(*operands) for _ in range(times)]


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    least = smallest()
    for rows, inputs, outputs in SIZES:
        x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
        stored = torch.randn(inputs, outputs)
        work = rows * inputs * outputs
        bar = None if least is None or work < least else LEAST
        for what, w in (("linear", weight), ("as GPT-2 stores it", stored.t())):
            times = max(1, (1 << 28) // work)
            products = (F.linear, torch.ops.gatecc.linear)
            one, other = best_of(*(repeated(p, (x, w, bias), times) for p in products), repeats=9)
            yield Row(f"{rows} x {inputs} x {outputs}, {what}", one / other, bar, at_most=False, unit="x")


if __name__ == "__main__":
    main("products", lambda: list(measure()))
