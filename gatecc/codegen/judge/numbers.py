"""A case of a family in the interpreter: its errors against float64, and what the kernels touch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from triton.runtime.errors import InterpreterError

from gatecc.codegen.judge.family import DTYPES, Family
from gatecc.codegen.judge.interpreted import Traffic, interpreting

SLACK = 2.0  # times eager's error, before the dtype's epsilon is added
TRAFFIC = 1.25  # bytes moved, of those that a launch meets


@dataclass(frozen=True)
class Error:
    """The largest error of a value, relative to its largest entry: ours, eager's in the same dtype, what is allowed."""

    value: str
    found: float
    eager: float
    most: float


@dataclass(frozen=True)
class Numbers:
    """What a case showed in a dtype. ``faults`` is empty if all is well."""

    family: str
    case: str
    dtype: str
    errors: tuple[Error, ...]
    traffic: dict[str, Traffic]
    faults: tuple[str, ...]
    exempt: tuple[str, ...] = ()  # why it takes more than is usual, where it does


def judge_numbers(family: Family, case: str, dtype: str) -> Numbers:
    """Run a case.

    A kernel may err by twice what ATen in the same dtype does plus the dtype's epsilon, both against float64, relative
    to the largest entry of a value; a sum of which little is left by more epsilons (see Family.cancelled). It must
    write what it was given, once, and move bytes within its budget.
    """
    torch.manual_seed(0)
    given = family.cases[case]()
    narrow = in_dtype(given, DTYPES[dtype])
    try:
        with interpreting(family.module()) as findings:
            found = family.run(narrow)
    except InterpreterError as error:
        return Numbers(family.name, case, dtype, (), {}, (f"it does not run: {error}",))
    errors, exempt = compared(family, case, dtype, narrow, found)
    faults = [*beyond(errors), *findings.outside, *findings.raced]
    for kernel, moved in findings.traffic.items():
        granted = family.exemption(kernel, "traffic", dtype)
        most = TRAFFIC if granted is None else granted.most
        exempt += () if granted is None or moved.ratio <= TRAFFIC else (granted.why,)
        if moved.ratio > most:
            faults.append(f"{kernel} moves {moved.ratio:.1f} times the bytes that it meets, {most:g} is allowed")
    why = tuple(dict.fromkeys(exempt))
    return Numbers(family.name, case, dtype, tuple(errors), findings.traffic, tuple(faults), why)


def compared(
    family: Family, case: str, dtype: str, narrow: dict[str, Any], found: dict[str, Tensor]
) -> tuple[list[Error], tuple[str, ...]]:
    """The errors of what kernels made of the call ``narrow``; and why they may be larger than is usual, if they are."""
    exact = in_dtype(narrow, torch.float64)
    eager, truth, cancelled = family.reference(narrow), family.reference(exact), family.cancelled(exact)
    pairs = [(name, relative(found[name], truth[name]), relative(eager[name], truth[name])) for name in truth]

    def held(epsilons: float) -> list[Error]:
        eps = torch.finfo(DTYPES[dtype]).eps
        more = {name: eps * max(epsilons, cancelled.get(name, 1.0)) for name in truth}
        return [Error(name, ours, theirs, SLACK * theirs + more[name]) for name, ours, theirs in pairs]

    granted = family.exemption(case, "error", dtype)
    if granted is None:
        return held(1), ()
    return held(granted.most), (granted.why,) if any(beyond(held(1))) else ()


def beyond(errors: list[Error]) -> Iterator[str]:
    """A sentence for each error that is too large."""
    for e in errors:
        if not e.found <= e.most:
            yield f"{e.value} errs by {e.found:.1e}, ATen by {e.eager:.1e}: {e.most:.1e} is allowed"


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest value; a NaN, or another shape, counts as infinite."""
    if found.shape != truth.shape:
        return float("inf")
    if not truth.numel():
        return 0.0
    found, truth = found.detach().double(), truth.detach().double()
    error = (found - truth).abs().max() / truth.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(nan=float("inf")))


def in_dtype(given: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The same call in another dtype."""
    return {n: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x for n, x in given.items()}
