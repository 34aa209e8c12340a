"""Samples: what routers that decide once for each sample share, whether between models or between blocks."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.gate import SourceShape
from gatecc.ir.router import RouterSpec


def hits(indices: Tensor, number: int) -> Tensor:
    """Which slots hold an expert. indices: (B, k) -> (B, k) of bool"""
    return indices == number


def weight_of(weights: Tensor, hit: Tensor) -> Tensor:
    """What an expert weighs for each sample. weights, hit: (B, k) -> (B,)"""
    return torch.where(hit, weights, torch.zeros_like(weights)).sum(1)


def over(values: Tensor, x: Tensor) -> Tensor:
    """(B,) as (B, 1, ...), to multiply rows of x by."""
    return values.reshape(-1, *[1] * (x.dim() - 1))


def check_one_row(spec: RouterSpec, sources: Sequence[SourceShape], what: str) -> None:
    """Refuse a source with tokens, which would give a row for each of them. Raises ArgumentError."""
    if spec.mask:
        raise ArgumentError(f"the router of {what} has no tokens to mask", found=f"mask={spec.mask}")
    for part, its in zip(spec.source.parts, sources, strict=False):
        if part.tokens and its.axes.positions.text != "b":
            raise ArgumentError(
                f"the router of {what} needs one row for each sample",
                found=f"{part}, which varies over {its.axes.positions}",
                expected=f"pool({part}), or a source with one value per sample",
            )
