"""What a transform costs beside the capture that it needs: llama of hidden 64 with 4, 16 and 64 layers.

``python benchmarks/transform_cost.py [--check]``. The cost of transform is canonicalize, match, rewrite and verify
(structure, contracts, and calls in four modes), without capture: its CPU time less that of all captures. The time of
capture is that of the whole model with dynamic sizes. Captures of further modes (train mode, and calls without
gradients), with the proofs by which layers share them, are counted apart: once with a scope for each layer, once with
the whole model as one scope, which has no layers that could share.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import transformers as hf
from _table import Row, cpu_seconds, main

import gatecc
from gatecc.report import Report

DEPTHS = (4, 16, 64)
LIMIT = 0.25
MODES_LIMIT = 4


def llama(depth: int) -> torch.nn.Module:
    """A llama with hidden size 64."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=depth,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return hf.LlamaForCausalLM(config).eval()


@dataclass(frozen=True)
class Cost:
    """CPU seconds: of a transform without its captures, of captures of further modes, of that of the whole model."""

    transform: float
    modes: float
    capture: float


def cost(depth: int, scope: Literal["auto", "model"] = "auto") -> Cost:
    """What a transform of so many layers costs."""
    model = llama(depth)
    ids = torch.randint(5, 96, (2, 16))
    reports: list[Report] = []

    def work() -> None:
        reports.append(gatecc.last_report(gatecc.transform(model, "gated-attention", (ids,), scope=scope)))

    total = cpu_seconds(work)
    times = {p.name: p.ms / 1e3 for p in reports[0].passes}
    modes = times["modes: capture"] + times["modes: share"]
    captures = sum(seconds for name, seconds in times.items() if name.endswith("capture"))
    return Cost(total - captures - times["modes: share"], modes, times["capture"])


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    cost(1)  # imports and first-call costs of torch.export belong to nobody
    runs = {depth: [cost(depth) for _ in range(3 if depth < 64 else 2)] for depth in DEPTHS}
    found = {depth: min(costs, key=lambda c: c.transform) for depth, costs in runs.items()}
    for depth, best in found.items():
        yield Row(f"{depth} layers: transform / capture", best.transform / best.capture, LIMIT)
        yield Row(f"{depth} layers: further modes / capture", best.modes / best.capture, MODES_LIMIT)
        yield Row(f"{depth} layers: capture", best.capture, unit="s")
        yield Row(f"{depth} layers: transform", best.transform, unit="s")
    whole = cost(DEPTHS[0], "model")
    yield Row(f"{DEPTHS[0]} layers, one scope: further modes / capture", whole.modes / whole.capture, MODES_LIMIT)
    growth = (found[64].transform / found[16].transform) / (64 / 16)
    yield Row("growth of transform from 16 to 64 layers, 1 = linear", growth, 1.1)


if __name__ == "__main__":
    main("transform_cost", lambda: list(measure()))
