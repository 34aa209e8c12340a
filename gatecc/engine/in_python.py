"""In Python: rewrites of a model whose control flow no graph holds. They bring modules, and no scope."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from torch import nn

from gatecc.capture.flops import counted
from gatecc.engine.contracts import reference
from gatecc.engine.install import Undo
from gatecc.engine.place import Task
from gatecc.errors import ExampleInputsError
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.select import select
from gatecc.ir.site import Site
from gatecc.ir.weights import Effect
from gatecc.report import EffectRow, Report, RewriteRow


def in_graphs(recipe: Recipe) -> bool:
    """Whether a recipe rewrites graphs; one without any rewrite is refused where graphs are."""
    return not recipe.rewrites or bool(without(recipe, in_python=True).rewrites)


def without(recipe: Recipe, *, in_python: bool) -> Recipe:
    """A recipe without the rewrites that are done in Python, or without those of graphs."""
    return replace(recipe, rewrites=tuple(r for r in recipe.rewrites if r.effects().in_python != in_python))


def reads_sites(recipe: Recipe) -> bool:
    """Whether a recipe has a rewrite that changes weights at sites and no graph."""
    return any(rewrite.effects().reads_sites for rewrite in recipe.rewrites)


def install(
    model: nn.Module, task: Task, rewrites: Sequence[Rewrite], sites: Sequence[Site], undo: Undo, report: Report
) -> list[Effect]:
    """Do rewrites on a model itself; returns what was done to it, as plain data. ``sites``: those of its graphs.

    No graph is rewritten, so operations are counted in runs on the example inputs. Raises what the rewrites raise,
    EmptySelectionError, and ExampleInputsError if the model does not run afterwards.
    """
    before = _flops(model, task) if task.look else None
    done: list[Effect] = []
    for rewrite in rewrites:
        clock = time.process_time()
        rows: list[EffectRow] = []
        new: dict[str, int] = {}
        wanted = select(rewrite.site, sites, report.refusals) if rewrite.effects().reads_sites else ()
        for effect in rewrite.edit_at(model, wanted) if wanted else rewrite.install(model):
            undo.effects.append((model, effect))
            made = effect.apply(model)
            done.append(effect.placed(""))
            rows.append(EffectRow(effect.path, effect.describe(), sum(made.values())))
            new |= made
        report.rewrites.append(
            RewriteRow(
                rewrite=rewrite.name,
                recipe=task.recipe.name,
                site=f"{rewrite.site.kind}#0",
                scope="",
                contract=str(rewrite.contract()),
                new_parameters=new,
                ms=(time.process_time() - clock) * 1e3,
                effects=tuple(rows),
            )
        )
        report.notes += rewrite.remarks(model)
    report.totals = replace(report.totals, contract="changes_function")
    if len(rewrites) == len(task.recipe.rewrites):  # no graph was captured
        report.totals = replace(report.totals, flops_before=before, bytes_before=None)
    if task.look:
        _, after = counted(lambda: reference(model, task.args, task.kwargs))
        report.totals = replace(report.totals, flops_after=after)
    return done


def _flops(model: nn.Module, task: Task) -> int | None:
    try:
        return counted(lambda: reference(model, task.args, task.kwargs))[1]
    except ExampleInputsError:  # outputs that only a router can put together
        return None
