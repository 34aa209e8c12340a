"""``gatecc::attention`` on a CPU against torch's fused attention, and against its own arithmetic.

``python benchmarks/attention.py [--check]``: forward, and forward with backward, on one sequence. The share of its
arithmetic: the products of the pairs that causality leaves (7 / 2 times as many with the backward) at the rate of a
product of 1536 x 1536 matrices of float32 in the same run, over the time.

``--gains FILE`` measures what gatecc.ops.attention.c.profit asks for, and enters it in FILE (gains.json beside it) for
the kind of CPU that the kernels are built for. With ``ATEN_CPU_CAPABILITY=avx2 MKL_ENABLE_INSTRUCTIONS=AVX2`` a CPU
with AVX-512 is measured as one without.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from _table import Row, best_of, cpu_seconds, main

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn.functional import scaled_dot_product_attention

from gatecc.codegen.c import build
from gatecc.ops.attention import cost
from gatecc.ops.attention.c.profit import unit

if os.environ.get("ATEN_CPU_CAPABILITY") == "avx2":
    build.FLAGS = (("-march=haswell", "-fopenmp"),)

SIDE = 1536
CASES = [  # heads, width, tokens, causal
    (4, 64, 512, True),
    (8, 32, 512, True),
    (4, 64, 1024, True),
    (8, 32, 1024, True),
    (4, 64, 512, False),
    (12, 64, 197, False),
]
LENGTHS = (32, 64, 128, 256, 512, 1024, 2048)
SHARE = 0.6
LEAST = 0.02  # seconds of a measurement


def calls(
    heads: int, width: int, tokens: int, kind: str, dtype: torch.dtype, training: bool
) -> list[Callable[[], object]]:
    """torch's fused attention and the operator, on the same random tensors."""
    q, k, v, grad = (torch.randn(1, tokens, heads, width, dtype=dtype).transpose(1, 2) for _ in range(4))
    q, k, v = (x.requires_grad_(training) for x in (q, k, v))
    causal = kind == "causal"
    mask = torch.rand(1, 1, tokens, tokens) < 0.9 if kind == "masked" else None

    def differentiated(out: torch.Tensor) -> Any:
        return torch.autograd.grad(out, (q, k, v), grad) if training else out

    def fused() -> Any:
        return differentiated(scaled_dot_product_attention(q, k, v, mask, is_causal=causal))

    def own() -> Any:
        return differentiated(torch.ops.gatecc.attention.default(q, k, v, None, mask, causal=causal)[0])

    return [fused, own]


def timed(works: list[Callable[[], object]], repeats: int = 5) -> list[float]:
    """Seconds of a call, best of several, each measured for as long as the clock needs."""

    def many(work: Callable[[], object], times: int) -> Callable[[], object]:
        return lambda: [work() for _ in range(times)]

    for work in works:
        work()
    times = [max(1, round(LEAST / max(cpu_seconds(work), 1e-6))) for work in works]
    best = best_of(*(many(work, n) for work, n in zip(works, times, strict=True)), repeats=repeats)
    return [seconds / n for seconds, n in zip(best, times, strict=True)]


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    a = torch.randn(SIDE, SIDE)
    for heads, width, tokens, causal in CASES:
        for training in (False, True):
            works = calls(heads, width, tokens, "causal" if causal else "full", torch.float32, training)
            fused, own, product = timed([*works, lambda: a @ a])
            flops = 4 * heads * width * cost.pairs(tokens, tokens, causal=causal) * (3.5 if training else 1)
            what = f"{heads} x {width}, {tokens} tokens{', causal' * causal}{', with backward' * training} ({unit()})"
            yield Row(f"{what}: against torch's", fused / own, 1.0, at_most=False, unit="x")
            share = flops / own * product / (2 * SIDE**3)
            yield Row(f"{what}: share of its arithmetic", share, SHARE, at_most=False)


def gains() -> dict[str, dict[str, dict[str, float]]]:
    """What profit.py reads, of this CPU."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        of_dtype = found[str(dtype).removeprefix("torch.")] = {}
        for training in (False, True):
            for kind in ("full", "causal", "masked"):
                rows = of_dtype[kind + ", training" * training] = {}
                for tokens in LENGTHS:
                    fused, own = timed(calls(4, 64, tokens, kind, dtype, training), repeats=3)
                    rows[str(tokens)] = round(fused / own, 2)
                print(unit(), dtype, kind, training, rows, file=sys.stderr)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--gains", type=Path)
    options, rest = parser.parse_known_args()
    if options.gains:
        torch.set_num_threads(1)
        table = json.loads(options.gains.read_text()) if options.gains.exists() else {}
        table[unit()] = gains()
        options.gains.write_text(json.dumps(table, indent=1) + "\n")
    else:
        main("attention", lambda: list(measure()), rest)
