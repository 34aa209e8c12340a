"""Mixtures of low-rank adapters on one Linear of 1024 by 1024: CPU time as a multiple of the Linear's, in one run.

``python benchmarks/adapters.py [--check]``. All adapters run, in two products with stacked matrices; with a router, two
of them. The loop is the sum over adapters as peft computes it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from _table import Row, best_of, main
from torch import Tensor, nn

import gatecc
from gatecc.passes.branch.low_rank import LowRanks

WIDTH = 1024
CASES = ((512, 32, 8, 1.7), (512, 8, 16, None), (512, 32, 16, None), (1, 32, 8, None))  # tokens, experts, rank, bar


def rows() -> list[Row]:
    """One row for each form of each case."""
    torch.set_num_threads(1)
    found: list[Row] = []
    for tokens, experts, rank, bar in CASES:
        x = torch.randn(1, tokens, WIDTH)
        base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Identity())
        options = {"sites": "linear[0]", "experts": experts, "rank": rank}
        every = gatecc.transform(base, gatecc.recipe("lora-mixture", **options), (x,), verify=False)
        routed = gatecc.transform(base, gatecc.recipe("lora-mixture", **options, k=2), (x,), verify=False)
        bank = next(m for m in every.modules() if isinstance(m, LowRanks))
        works = [_repeated(work, x) for work in (base, every, routed, _loop(base, bank))]
        with torch.no_grad():
            for work in works:
                work()
            linear, *others = best_of(*works, repeats=9)
        where = f"{tokens} tokens, {experts} adapters of rank {rank}"
        names = ("all, in two products", "two of them, by a router", "all, in a loop")
        for name, seconds in zip(names, others, strict=True):
            found.append(Row(f"{where}: {name}", seconds / linear, bar if name == names[0] else None, unit="x"))
    return found


def _repeated(work: Callable[[Tensor], Tensor], x: Tensor) -> Callable[[], None]:
    def run() -> None:
        for _ in range(1 if x.size(1) > 1 else 50):
            work(x)

    return run


def _loop(base: nn.Module, bank: LowRanks) -> Callable[[Tensor], Tensor]:
    """One adapter after the other, with weights from a linear layer."""
    gate = nn.Linear(WIDTH, bank.a.size(0))

    def run(x: Tensor) -> Tensor:
        y, weights = base(x), gate(x).softmax(-1)
        for e, (a, b) in enumerate(zip(bank.a, bank.b, strict=True)):
            y = y + weights[..., e : e + 1] * (F.linear(x, a) @ b)
        return y

    return run


if __name__ == "__main__":
    main("adapters", rows)
