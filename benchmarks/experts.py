"""Experts on one CPU thread: gatecc::moe_ffn against dense layers, against transformers, and what else has a bar.

``python benchmarks/experts.py [SECTION ...] [--check]``; without names, all sections. Ratios are of CPU times taken in
turn in this run. The floor of a prefill is a dense gated FFN of the same active FLOPs: as wide as k experts together on
each token, or one expert on each slot's row, 256 rows at a time, whichever is faster. That of a decode step is the
first of these: it reads the same bytes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from _table import Row, best_of, main
from torch import Tensor, nn
from upcycling import rows as rows_of_upcycling

import gatecc

DTYPES = (torch.float32, torch.bfloat16)
AT_ONCE = 256  # rows of the floor
LARGEST_COPY = 4e9  # bytes of the weights that batched_mm gathers; beyond them it is left out


class Layer(NamedTuple):
    """Experts and what they are called with."""

    x: Tensor
    weights: Tensor
    indices: Tensor
    gate_up: Tensor
    down: Tensor


def layer(T: int, d: int, hidden: int, E: int, k: int, dtype: torch.dtype) -> Layer:
    """Random experts, each slot's drawn at random."""
    gate_up, down = torch.randn(E, 2 * hidden, d) * d**-0.5, torch.randn(E, d, hidden) * hidden**-0.5
    weights, indices = torch.rand(T, E).topk(k)
    return Layer(torch.randn(T, d).to(dtype), weights.softmax(-1), indices, gate_up.to(dtype), down.to(dtype))


def dense(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """A gated FFN, as models have it. x: (rows, d), gate_up: (2F, d), down: (d, F)."""
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate).mul_(up), down)


def wide(given: Layer) -> tuple[Tensor, Tensor]:
    """The first k experts as one FFN: (2 k F, d) and (d, k F)."""
    k, hidden = given.indices.size(1), given.down.size(2)
    gate, up = given.gate_up[:k].unflatten(1, (2, hidden)).unbind(1)
    return torch.cat([gate.flatten(0, 1), up.flatten(0, 1)]), given.down[:k].movedim(0, 1).flatten(1)


def floors(given: Layer) -> list[Callable[[], object]]:
    """Both floors of a prefill."""
    rows, weights = given.x.repeat_interleave(given.indices.size(1), 0), wide(given)
    return [
        lambda: dense(given.x, *weights),
        lambda: [dense(block, given.gate_up[0], given.down[0]) for block in rows.split(AT_ONCE)],
    ]


def short(dtype: torch.dtype) -> str:
    """Its name."""
    return str(dtype).removeprefix("torch.")


@torch.no_grad()
def prefill() -> Iterator[Row]:
    """Forward passes against the floor, from many rows per expert to few."""
    cases = [(2048, 512, 1408, 8, 2, 1.05, 6), (1024, 256, 704, 64, 8, 1.15, 8), (512, 512, 1408, 16, 1, 1.4, 20)]
    for T, d, hidden, E, k, bar, repeats in cases:
        for dtype in DTYPES:
            given = layer(T, d, hidden, E, k, dtype)
            works = (lambda given=given: torch.ops.gatecc.moe_ffn(*given), *floors(given))
            ours, *below = best_of(*works, repeats=repeats)
            # At few rows the bar is for CPUs with fast bfloat16; elsewhere float32 keeps it.
            told = dtype == torch.bfloat16 or T * k // E > 32
            what = f"prefill {short(dtype)}, {T * k // E} rows per expert (E={E} k={k}): ours / floor"
            yield Row(what, ours / min(below), bar if told else None)


@torch.no_grad()
def decode() -> Iterator[Row]:
    """One token."""
    for d, hidden, E, k in [(512, 1408, 8, 2), (1024, 2816, 8, 2), (512, 1408, 64, 8)]:
        for dtype in DTYPES:
            given = layer(1, d, hidden, E, k, dtype)
            works = (lambda given=given: torch.ops.gatecc.moe_ffn(*given), floors(given)[0])
            ours, below = best_of(*works, repeats=60)
            yield Row(f"decode {short(dtype)}, d={d} E={E} k={k}: ours / floor", ours / below, 1.1)


def training() -> Iterator[Row]:
    """Forward and backward passes, gradients of everything; the floor's as well."""
    for dtype, bar in zip(DTYPES, (1.25, 1.35), strict=True):
        yield _training(layer(512, 256, 704, 8, 2, dtype), bar)


def _training(given: Layer, bar: float) -> Row:
    weights = [w.requires_grad_() for w in wide(given)]
    leaves = [t.requires_grad_() for t in (given.x, given.weights, given.gate_up, given.down)]
    grad = torch.randn_like(given.x)
    ours, below = best_of(
        lambda: torch.autograd.grad(torch.ops.gatecc.moe_ffn(*given), leaves, grad),
        lambda: torch.autograd.grad(_trained(given.x, *weights), (given.x, *weights), grad),
        repeats=20,
    )
    return Row(f"forward + backward {short(given.x.dtype)}, E={len(given.down)}: ours / dense", ours / below, bar)


def _trained(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = F.linear(x, gate_up).chunk(2, -1)
    return F.linear(F.silu(gate) * up, down)


@torch.no_grad()
def against_transformers() -> Iterator[Row]:
    """The implementations of transformers on the same weights."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    d, hidden = 256, 704
    for dtype in DTYPES:
        for E in (8, 64):
            config = MixtralConfig(hidden_size=d, intermediate_size=hidden, num_local_experts=E)
            experts: Any = MixtralExperts(config).to(dtype)
            for k in (2, 8):
                for T, bar, repeats in ((1, 1.0, 60), (64, 1.0, 8), (2048, 1.03, 2)):
                    given = layer(T, d, hidden, E, k, dtype)
                    experts.gate_up_proj.copy_(given.gate_up)
                    experts.down_proj.copy_(given.down)
                    names = ["eager", "grouped_mm", "batched_mm"]
                    if T * k * 3 * d * hidden * given.x.element_size() > LARGEST_COPY:
                        names.pop()
                    yield _versus(names, experts, config, given, bar, repeats)


def _versus(names: list[str], experts: nn.Module, config: Any, given: Layer, bar: float, repeats: int) -> Row:
    def theirs(name: str) -> Tensor:
        config._experts_implementation = name
        return experts(given.x, given.indices, given.weights.to(given.x.dtype))

    def ours() -> Tensor:
        return torch.ops.gatecc.moe_ffn(*given)

    for name in names:
        assert torch.allclose(theirs(name).float(), ours().float(), rtol=0.05, atol=0.05)
    taken = best_of(ours, *(lambda name=name: theirs(name) for name in names), repeats=repeats)
    (T, k), E = given.indices.shape, given.down.size(0)
    best = min(range(len(names)), key=lambda i: taken[1 + i])
    what = f"{short(given.x.dtype)} E={E} k={k} T={T}: ours / {names[best]}, the best of {len(names)}"
    return Row(what, taken[0] / taken[1 + best], bar)


class Routed(nn.Module):
    """A router and experts."""

    def __init__(self) -> None:
        super().__init__()
        given = layer(1, 32, 48, 8, 2, torch.float32)
        self.router = nn.Linear(32, 8, bias=False)
        self.gate_up, self.down = nn.Parameter(given.gate_up), nn.Parameter(given.down)

    def forward(self, x: Tensor) -> Tensor:
        """x: (T, 32)"""
        weights, indices = self.router(x).softmax(-1).topk(2)
        return torch.ops.gatecc.moe_ffn(x, weights, indices, self.gate_up, self.down)


def compiled() -> Iterator[Row]:
    """Graph breaks, and recompiles over four token counts, in training."""
    counters, model = torch._dynamo.utils.counters, Routed()
    counters.clear()
    run = torch.compile(model, backend="aot_eager")
    for T in (256, 320, 512, 1):
        run(torch.randn(T, 32)).sum().backward()
    yield Row("graph breaks under torch.compile", sum(counters["graph_break"].values()), 0)
    yield Row("recompiles over 4 token counts", counters["stats"]["unique_graphs"] - 1, 2)


def twice() -> Iterator[Row]:
    """The same run twice: results and gradients that differ in a bit."""
    for dtype in DTYPES:
        given = layer(300, 64, 96, 8, 3, dtype)
        leaves = [t.requires_grad_() for t in (given.x, given.weights, given.gate_up, given.down)]
        runs = [
            [out := torch.ops.gatecc.moe_ffn(*given), *torch.autograd.grad(out.float().square().sum(), leaves)]
            for _ in range(2)
        ]
        different = sum(not torch.equal(a, b) for a, b in zip(*runs, strict=True))
        yield Row(f"{short(dtype)}: tensors that differ between two runs", different, 0)


def upcycling() -> Iterator[Row]:
    """Upcycled models against dense ones at step 0: benchmarks/upcycling.py."""
    yield from rows_of_upcycling()


# A section per concern. One that is added stands here, and is run by its name alone as well.
SECTIONS: tuple[Callable[[], Iterator[Row]], ...] = (
    prefill,
    decode,
    training,
    against_transformers,
    compiled,
    twice,
    upcycling,
)


def measure(names: list[str]) -> Iterator[Row]:
    """The rows of the sections that are named, of all if none is."""
    for section in SECTIONS:
        if not names or section.__name__ in names:
            torch.manual_seed(0)
            yield from section()


if __name__ == "__main__":
    known = {section.__name__ for section in SECTIONS}
    chosen = [a for a in sys.argv[1:] if a in known]
    assert gatecc.__name__  # registers the operator
    main("experts", lambda: list(measure(chosen)), [a for a in sys.argv[1:] if a not in known])
