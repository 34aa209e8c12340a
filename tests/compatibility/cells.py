"""Cells: one recipe under one wrapper in one mode, what came of it, and a cover of all pairs."""

from __future__ import annotations

import functools
import itertools
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from gatecc.errors import GateccError
from tests.compatibility.modes import MODES, Results
from tests.compatibility.subject import RECIPES, Rewrite
from tests.compatibility.wrappers import WRAPPERS

Kind = Literal["works", "refused", "library", "fails"]


@dataclass(frozen=True)
class Cell:
    """One place of the matrix."""

    recipe: str
    wrapper: str
    mode: str

    def __str__(self) -> str:
        return f"{self.recipe} / {self.wrapper} / {self.mode}"


@dataclass(frozen=True)
class Outcome:
    """``library``: the same call of a model that was not transformed fails as well. ``text`` is a code or a reason."""

    kind: Kind
    text: str = ""


def every_cell() -> list[Cell]:
    """The whole matrix."""
    return [Cell(*names) for names in itertools.product(RECIPES, WRAPPERS, MODES)]


def cover() -> list[Cell]:
    """Cells in which every pair of recipe and wrapper, recipe and mode, wrapper and mode occurs, by a greedy choice."""
    left = {pair for cell in every_cell() for pair in _pairs(cell)}
    chosen: list[Cell] = []
    while left:
        best = max(every_cell(), key=lambda cell: len(left & _pairs(cell)))
        left -= _pairs(best)
        chosen.append(best)
    return chosen


def _pairs(cell: Cell) -> set[tuple[str, ...]]:
    return set(itertools.combinations((f"r {cell.recipe}", f"w {cell.wrapper}", f"m {cell.mode}"), 2))


def run(cell: Cell) -> Outcome:
    """Run one cell. What is wrong beyond rounding, or raises anything but a GateccError, fails."""
    try:
        found, right, watched, tolerance = _measure(cell, Rewrite(cell.recipe))
    except GateccError as e:
        return Outcome("refused", e.code)
    except Exception as e:
        control = _control(cell.wrapper, cell.mode)
        if isinstance(control, Exception):
            return Outcome("library", _first_line(control))
        return Outcome("fails", f"raises {_first_line(e)}")
    worst, name = _distance(found, right)
    if not worst <= tolerance:
        return Outcome("fails", f"{name} is off by {worst:.2g}")
    if watched is not None:
        control = _control(cell.wrapper, cell.mode)
        if not all(watched) or (not isinstance(control, Exception) and len(watched) < len(control)):
            return Outcome("fails", f"a hook saw {watched}, on a plain model {control}")
    return Outcome("works")


def _measure(cell: Cell, rewrite: Rewrite) -> tuple[Results, Results, list[bool] | None, float]:
    mode = MODES[cell.mode]
    with ExitStack() as stack:
        torch.manual_seed(0)
        setup = WRAPPERS[cell.wrapper](rewrite, cell.mode, stack)
        run_it = setup.runs.get(cell.mode)
        found = run_it() if run_it is not None else mode.run(setup.module)
        watched = setup.watched() if setup.watched else None
        right = mode.right(setup.right)
    if not setup.gradients:
        right = {name: x for name, x in right.items() if not name.startswith("grad ")}
    return found, right, watched, max(mode.tolerance, setup.tolerance)


@functools.cache
def _control(wrapper: str, mode: str) -> Any:
    """What the wrapper saw of a model that was not transformed, or the exception that it raised."""
    try:
        return _measure(Cell("", wrapper, mode), Rewrite())[2]
    except Exception as e:
        return e


def _distance(found: Results, right: Results) -> tuple[float, str]:
    """The largest difference over all common names, of the largest right value; a call that yields none is wrong."""
    common = sorted(found.keys() & right.keys())
    worst, name = (0.0, "") if common else (float("inf"), "no result")
    for n in common:
        gap = _gap(found[n], right[n])
        if not gap <= worst:
            worst, name = gap, n
    return worst, name


def _gap(x: Tensor, y: Tensor) -> float:
    if x.shape != y.shape:
        return float("inf")
    return float(((x - y).abs().max() / y.abs().max().clamp(min=1e-3)).detach())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:140] if lines else ''}"
