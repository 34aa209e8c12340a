"""Races on a GPU: pieces of work by several contenders, timed in turn."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

Work = Callable[[], object]


@dataclass(frozen=True)
class Race:
    """One piece of work by several contenders: ``ours`` and others, or the reason why one does not take part."""

    what: str
    contenders: dict[str, Work | str]


@dataclass
class Result:
    """Milliseconds by contender, the median of several runs, and why others have none."""

    what: str
    milliseconds: dict[str, float] = field(default_factory=dict[str, float])
    absent: dict[str, str] = field(default_factory=dict[str, str])


@dataclass(frozen=True)
class Place:
    """Where and how large. ``small``: a rehearsal."""

    device: torch.device
    dtype: torch.dtype
    small: bool

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, device=self.device, dtype=self.dtype)

    def pick(self, full: int, rehearsal: int) -> int:
        return rehearsal if self.small else full


def mode(place: Place) -> str | None:
    return "aot_eager" if place.small else None


def other(place: Place) -> str:
    return "aot_eager" if place.small else "inductor"


def call(function: Any, name: str, tensors: tuple[Tensor | None, ...], *, backward: bool) -> Work | str:
    """A call with gradients of everything, or without any."""
    if isinstance(function, str):
        return function
    given = tensors[:3] if name == "flash SDPA" else tensors
    if name == "fla-core":
        given = tuple(with_heads_last(x) for x in given)
    if not backward:
        return quietly(lambda: function(*given))
    leaves = [None if x is None else x.detach().requires_grad_() for x in given]
    return lambda: differentiated(function(*leaves), [x for x in leaves if x is not None])


def differentiated(y: Tensor, leaves: list[Tensor]) -> object:
    return torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)


def quietly(work: Work) -> Work:
    def run() -> object:
        with torch.no_grad():
            return work()

    return run


def with_heads_last(x: Tensor | None) -> Tensor | None:
    """(B, H, N, ...) as fla-core has it, (B, N, H, ...), copied once; a gate per head has no last axis there."""
    if x is None:
        return None
    x = x.transpose(1, 2)
    return (x.squeeze(-1) if x.dim() == 4 and x.size(-1) == 1 else x).contiguous()


def timed(race: Race, place: Place) -> Result:
    """Each contender in turn. One that fails is absent, with its error."""
    result = Result(race.what)
    for name, work in race.contenders.items():
        if isinstance(work, str):
            result.absent[name] = work
            continue
        try:
            result.milliseconds[name] = _median(work, place)
        except Exception as e:  # out of memory, a kernel of others that this GPU lacks
            result.absent[name] = f"{type(e).__name__}: {e}"[:300]
    return result


def _median(work: Work, place: Place) -> float:
    """Median of up to 20 runs with cold caches, after two that compile; CPU time in a rehearsal."""
    work()
    if place.device.type != "cuda":
        start = time.process_time()
        work()
        return 1e3 * (time.process_time() - start)
    work()
    flush = torch.empty(1 << 28, dtype=torch.int8, device=place.device)  # larger than any L2
    found: list[float] = []
    until = time.monotonic() + 2
    while len(found) < 20 and (len(found) < 3 or time.monotonic() < until):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end))
    return statistics.median(found)


def show(result: Result) -> None:
    table = Table(title=result.what)
    for column in ("contender", "ms", "of ours"):
        table.add_column(column, justify="left" if column == "contender" else "right")
    ours = result.milliseconds.get("ours")
    for name, ms in result.milliseconds.items():
        table.add_row(name, f"{ms:.4g}", "" if not ours else f"{ms / ours:.2f}")
    for name, why in result.absent.items():
        table.add_row(name, "", why)
    Console().print(table)
