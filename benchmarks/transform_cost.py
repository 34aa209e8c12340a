"""What a transform costs beside the capture that it needs: llama of hidden 64 with 4, 16 and 64 layers.

``python benchmarks/transform_cost.py [--check]``. The cost of transform is canonicalize, match, rewrite and verify
(structure and contracts), without capture: its CPU time less that of all captures. The time of capture is that of the
whole model with dynamic sizes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import transformers as hf
from _table import Row, cpu_seconds, main

import gatecc
from gatecc.report import Report

DEPTHS = (4, 16, 64)
LIMIT = 0.25


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


def cost(depth: int) -> tuple[float, float]:
    """CPU seconds of a transform without its captures, and of the capture of the whole model."""
    model = llama(depth)
    ids = torch.randint(5, 96, (2, 16))
    reports: list[Report] = []

    def work() -> None:
        reports.append(gatecc.last_report(gatecc.transform(model, "gated-attention", (ids,))))

    total = cpu_seconds(work)
    times = {p.name: p.ms / 1e3 for p in reports[0].passes}
    captures = sum(seconds for name, seconds in times.items() if name.endswith("capture"))
    return total - captures, times["capture"]


def measure() -> Iterator[Row]:
    """The rows of the benchmark."""
    cost(1)  # imports and first-call costs of torch.export belong to nobody
    found = {depth: min(cost(depth) for _ in range(3 if depth < 64 else 2)) for depth in DEPTHS}
    for depth, (transform, capture) in found.items():
        yield Row(f"{depth} layers: transform / capture", transform / capture, LIMIT)
        yield Row(f"{depth} layers: capture", capture, unit="s")
        yield Row(f"{depth} layers: transform", transform, unit="s")
    growth = (found[64][0] / found[16][0]) / (64 / 16)
    yield Row("growth of transform from 16 to 64 layers, 1 = linear", growth, 1.1)


if __name__ == "__main__":
    main("transform_cost", lambda: list(measure()))
