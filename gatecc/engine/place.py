"""place: the planned scopes are installed, and where one is too small or gone past, its parent is the scope instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from gatecc.capture.record import record_calls
from gatecc.engine.analyse import Analysis
from gatecc.engine.install import Installer, Undo
from gatecc.engine.modes import acts
from gatecc.engine.plan import Plan, called_modules, plans_of
from gatecc.errors import CaptureError, SiteRefusedError
from gatecc.ir.rewrite import Recipe
from gatecc.passes.ensemble.ensemble import Ensemble, every_member
from gatecc.report import PassRow, Report
from gatecc.scope.fast_paths import fast_paths_off
from gatecc.scope.state import base_class


@dataclass(frozen=True)
class Task:
    """What is to be done. ``look``: call the result in four modes; ``missed``: modules known to be gone past."""

    recipe: Recipe
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    scope: str
    look: bool
    missed: frozenset[str]


def place(
    model: nn.Module, task: Task, analysis: Analysis, undo: Undo, report: Report
) -> tuple[Installer, tuple[str, ...]]:
    """Install the scopes of a recipe, the smallest that do. Returns what installed them, and the modules gone past.

    Raises EmptySelectionError, SiteRefusedError, CaptureError, GraphError, ContractError.
    """
    with every_member(model):
        return _place(model, task, analysis, undo, report)


def _place(
    model: nn.Module, task: Task, analysis: Analysis, undo: Undo, report: Report
) -> tuple[Installer, tuple[str, ...]]:
    called = called_modules(model, task.args, task.kwargs)
    too_small: set[str] = set()
    missed = set(task.missed)
    while True:
        plans, left_out = plans_of(model, task.recipe, analysis, task.scope, called - missed, too_small)
        _refuse_ensembles(model, plans)
        work = Installer(model, task.recipe, undo, report, analysis.programs)
        failed, unproved = _install(work, plans, {p.fqn for p in analysis.programs}, task.args, task.kwargs)
        more = set[str]() if failed else _seen_to_act(work, plans, analysis, task)
        if not failed and not more:
            break
        tried = {fqn for fqn in failed if any(f"{inner}.".startswith(f"{fqn}.") for inner in missed)}
        climbing = failed - tried if unproved else set[str]()
        too_small |= failed - climbing
        missed |= more | climbing
        undo.run(model)
        report.rewrites.clear()
    report.refusals = [*report.refusals, *left_out]
    return work, tuple(sorted(missed))


def _refuse_ensembles(model: nn.Module, plans: list[Plan]) -> None:
    """The graph of an ensemble holds all of its members: what is not chosen would run from then on."""
    for plan in plans:
        for name, module in model.get_submodule(plan.fqn).named_modules():
            if isinstance(module, Ensemble):
                raise SiteRefusedError(
                    "the rewrite needs a graph with a whole ensemble in it, and in a graph every member runs",
                    where=f"{plan.fqn}.{name}".strip(".") or type(model).__name__,
                    found=", ".join(str(a.rewrite) for a in plan.applied),
                    do="select sites inside of the members, or rewrite each member before gatecc.ensemble",
                )


def _install(
    work: Installer, plans: list[Plan], largest: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[set[str], bool]:
    """Install all plans. Returns the scopes that turned out too small, one that failed and the others of its class; and
    whether it was a site that alone lacks what the rewrite needs.

    A submodule on its own can hide what its surroundings prove: streams that are one in the parent come in twice. Then
    the parent is tried, once. Where the site is not there at all, sizes that are constants of the model became inputs:
    the largest graph has them.
    """
    calls, _ = record_calls(work.model, [p.fqn for p in plans], args, kwargs)
    for plan in sorted(plans, key=lambda p: -p.fqn.count(".") - bool(p.fqn)):
        try:
            work.install(plan, calls[plan.fqn])
        except (CaptureError, SiteRefusedError) as e:
            if plan.fqn in largest:
                raise
            work.report.notes.append(f"{plan.fqn}: rewritten in a larger graph; alone: {e.found}")
            cls = base_class(work.model.get_submodule(plan.fqn))
            like = {p.fqn for p in plans if base_class(work.model.get_submodule(p.fqn)) is cls} - largest
            return like, isinstance(e, SiteRefusedError)
    return set(), False


def _seen_to_act(work: Installer, plans: list[Plan], analysis: Analysis, task: Task) -> set[str]:
    """Switch off what goes past the scopes, and see that they act in every mode. Returns those that some mode misses: a
    parent reads their weights and does not call them, so the parent has to be the scope.

    Raises ContractError if the scope that is missed has no parent in a graph.
    """
    model, report, undo = work.model, work.report, work.undo
    undo.switches += (switches := fast_paths_off(model))
    if switches:
        where = ", ".join(dict.fromkeys(s.fqn or type(model).__name__ for s in switches))
        report.notes.append(f"torch's fused path is off in {where}: it reads weights past the rewritten modules")
    if not task.look:
        return set()
    found = acts(model, [p.fqn for p in plans], work.effects, (task.args, task.kwargs))
    largest = {p.fqn for p in analysis.programs}
    for fqn, error in found.missed.items():
        if fqn in largest or fqn not in {p.fqn for p in plans}:
            raise error
        report.notes.append(f"{fqn}: rewritten in the graph of a parent; alone: {error.found}")
    if not found.missed:
        report.notes += found.notes
        report.passes = [*report.passes, *(PassRow(f"modes: {n}", s * 1e3) for n, s in found.seconds.items())]
    return set(found.missed)
