"""Costs: parameters and operations of each member, and of the path that a sample takes against all of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Cost:
    """What runs for a sample of the example's sizes: parameters that are read, and floating-point operations."""

    parameters: int
    flops: float

    def __str__(self) -> str:
        return f"{self.parameters:,} parameters, {round(self.flops):,} FLOP"


def parameters_of(modules: Iterable[nn.Module]) -> int:
    """The elements of their parameters, those that several hold once."""
    return sum({id(p): p.numel() for module in modules for p in module.parameters()}.values())


def table(rows: Mapping[str, Cost]) -> str:
    """Costs as lines of text, names first."""
    width = max(map(len, rows))
    lines = [f"{'':<{width}}  {'parameters':>15}  {'FLOP a sample':>17}"]
    lines += [f"{name:<{width}}  {cost.parameters:>15,}  {round(cost.flops):>17,}" for name, cost in rows.items()]
    return "\n".join(lines)
