"""transform: from a model and a recipe to a model of the same class whose chosen submodules run rewritten graphs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

from torch import nn

from gatecc.capture.adapters import Setting
from gatecc.capture.compiled import behind, compiled_like
from gatecc.capture.shield import shielded
from gatecc.capture.signature import split_inputs
from gatecc.capture.wrappers import refuse_wrapped
from gatecc.decoder.runtime.serving import is_served, serve, stop_serving
from gatecc.engine import duplicates, notes
from gatecc.engine.analyse import (
    Analysis,
    Inputs,
    active_count,
    analyse,
    check_in_place,
    check_model,
    evaluation,
    parameter_count,
    report_of,
)
from gatecc.engine.caches import caches_off, caches_on, why_no_cache
from gatecc.engine.contracts import Checked, Reference, at_another_size, check, reference
from gatecc.engine.in_python import in_graphs, install, reads_sites, without
from gatecc.engine.install import Installer, Undo
from gatecc.engine.measured import measured
from gatecc.engine.other_size import one_more
from gatecc.engine.place import Task, place
from gatecc.engine.put_off import NOTE, buffers_on_meta, moved, on_meta
from gatecc.errors import ArgumentError, CaptureError, EmptySelectionError, GraphError, SiteRefusedError
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.weights import Effect
from gatecc.recipes import resolve
from gatecc.report import Report
from gatecc.scope.fast_paths import Switch, fast_paths_on
from gatecc.scope.scope import remove
from gatecc.scope.state import scopes

HISTORY = "_gatecc_history"
AFTER: list[Callable[[nn.Module], None]] = []  # called with each model that was transformed or reverted


@dataclass(frozen=True, eq=False)
class Step:
    """One transform of a model: what save replays and revert undoes. Names are FQNs in the model."""

    recipe: Recipe
    scope: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    effects: tuple[Effect, ...]  # what was done to weights and modules, in order
    report: Report
    caches: tuple[Setting, ...] = ()  # configurations whose use_cache was switched off, and what it was
    switches: tuple[Switch, ...] = ()  # fast paths of torch that were switched off
    missed: tuple[str, ...] = ()  # modules that some mode goes past, so that a parent is the scope


@shielded
def transform(
    model: nn.Module,
    recipe: str | Recipe | Rewrite | Sequence[Rewrite],
    example_inputs: Inputs,
    *,
    scope: Literal["auto", "model"] = "auto",
    inplace: bool = False,
    verify: bool = True,
) -> nn.Module:
    """Rewrite a model by a recipe; the result has the same class, call and parameter names, plus the new parameters.

    ``recipe``: a name from `recipes()`, a Recipe, a rewrite or a list of rewrites. ``example_inputs``: a tuple is
    positional, a dict is keyword arguments, ``(tuple, dict)`` is both. ``scope="auto"`` rewrites the smallest submodule
    that holds each site; ``"model"`` the model as one graph. ``verify=False`` skips the numerical check of contracts,
    graphs are always checked. The model itself is untouched unless ``inplace``; after an error it is untouched anyway.
    Of a model that torch.compile was given, the model behind is rewritten, and compiled again in the same way. A model
    on the meta device is rewritten without numbers: `materialise` gives it weights and checks it.

    Raises UnknownRecipeError, EmptySelectionError, ExampleInputsError, UnsupportedModelError, CaptureError, GraphError,
    ContractError. `last_report(result)` tells what was done.
    """
    made = rewritten(behind(model), resolve(recipe), example_inputs, scope, inplace=inplace, verify=verify)
    return model if inplace else compiled_like(model, made)


def rewritten(
    model: nn.Module,
    wanted: Recipe,
    example_inputs: Inputs,
    scope: str,
    *,
    inplace: bool,
    verify: bool,
    missed: Collection[str] = (),
) -> nn.Module:
    """`transform`, told which modules some mode goes past: what a transform that is done again knows already."""
    args, kwargs = given = split_inputs(example_inputs)
    check_model(model, empty=True)
    if inplace:
        check_in_place(model)
    if scope not in ("auto", "model"):
        raise ArgumentError("unknown scope", found=repr(scope), expected='"auto" or "model"')
    if on_meta(model):
        target = model if inplace else _copy(model)
        with buffers_on_meta(target):
            args, kwargs = moved(given, "meta")
            task = Task(wanted, args, kwargs, scope, look=False, missed=frozenset(missed))
            return _rewritten(model, target, task, given, verify=False)
    task = Task(wanted, args, kwargs, scope, look=verify, missed=frozenset(missed))
    return _rewritten(model, model if inplace else None, task, given, verify=verify)


def _rewritten(model: nn.Module, target: nn.Module | None, task: Task, given: Any, *, verify: bool) -> nn.Module:
    """Rewrite ``target``, which is ``model`` or a copy of it; ``given`` are the inputs that the step is to hold.

    Without a target, a copy that is made once the model has run without gradients: what its forward leaves on it, such
    as a weight that is computed from others, could not be copied with them.
    """
    wanted, args, kwargs = task.recipe, task.args, task.kwargs
    undo = Undo()
    old = {id(p) for p in model.parameters()}
    with evaluation(model):
        before = reference(model, args, kwargs) if verify and in_graphs(wanted) else None
    target = _copy(model) if target is None else target
    undo.classes = [(m, type(m)) for m in target.modules() if is_served(m)]
    try:
        with evaluation(target):
            captured = in_graphs(wanted) or reads_sites(wanted)
            analysis = analyse(target, args, kwargs) if captured else Analysis()
            if before is not None:
                with evaluation(model):
                    at_another_size(before, model, one_more(analysis.programs, analysis.sites, args, kwargs))
                _check_apart(target, task, analysis, before)
            step = replace(_transform(target, task, analysis, undo), inputs=given)
            if before is not None:
                outcome = check(before, target, wanted, args, kwargs)
                step = replace(step, report=_checked(step.report, outcome))
    except BaseException:
        undo.run(target)
        raise
    earlier = [(past.recipe, past.report) for past in history(model)]
    step.report.notes += [
        *notes.again(wanted, step.report, earlier),
        *notes.kept(wanted, step.report),
        *notes.edits(wanted, analysis.sites),
        *notes.optimizer(model, target, old),
        *duplicates.notes(target, old),
    ]
    vars(target)[HISTORY] = (*history(model), step)
    for call in AFTER:
        call(target)
    return target


def last_report(model: nn.Module) -> Report:
    """The report of the last transform of a model. Raises ArgumentError for a model that was not transformed."""
    steps = history(model)
    if not steps:
        raise ArgumentError("this model has no report", found=type(model).__name__, do="gatecc.inspect(model, inputs)")
    return steps[-1].report


def history(model: nn.Module) -> tuple[Step, ...]:
    """The transforms that a model went through, first to last."""
    return vars(behind(model)).get(HISTORY, ())


@shielded
def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo every transform of a model: its parameters, outputs and state dict are bitwise those of before.

    Changes that training made to the model's own parameters stay; the new parameters are dropped. Raises
    UnsupportedModelError for a model that is wrapped (DDP, FSDP), as wrappers would go on holding the dropped
    parameters; and where a weight that a rewrite changed was quantised since.
    """
    refuse_wrapped(model)
    for effect in [effect for step in history(model) for effect in step.effects]:
        effect.check(behind(model))
    target = behind(model) if inplace else copy.deepcopy(behind(model))
    for step in reversed(history(target)):
        caches_on(step.caches)
        fast_paths_on(target, step.switches)
        for effect in reversed(step.effects):
            effect.undo(target)
    for module in target.modules():
        stop_serving(module)
    for _, module, _ in list(scopes(target)):
        remove(module)
    vars(target).pop(HISTORY, None)
    for call in AFTER:
        call(target)
    return model if inplace else compiled_like(model, target)


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise ArgumentError(
            "the model cannot be copied",
            found=f"{type(e).__name__}: {e}",
            do="pass inplace=True to rewrite it as it is",
        ) from e


def _check_apart(model: nn.Module, task: Task, analysis: Analysis, before: Reference) -> None:
    """Check rewrites that keep the model's function by themselves, if others of their recipe change it.

    Together they cannot be compared with the original. The model is left as it was. Raises ContractError.
    """
    kept = tuple(r for r in task.recipe.rewrites if r.contract().checked)
    if not kept or len(kept) == len(task.recipe.rewrites):
        return
    alone = replace(task, recipe=replace(task.recipe, rewrites=kept), look=False)
    undo = Undo(classes=[(m, type(m)) for m in model.modules() if is_served(m)])
    try:
        _transform(model, alone, analysis, undo)
        outcome = check(replace(before, notes=[]), model, alone.recipe, task.args, task.kwargs)
    except (ArgumentError, CaptureError, EmptySelectionError, GraphError, SiteRefusedError) as e:
        names = ", ".join(map(str, kept))
        before.notes.append(
            f"{names} not checked: cannot be done without the rewrites that change the function: {e.what}"
        )
        return
    finally:
        undo.run(model)
    before.notes.append(f"{', '.join(map(str, kept))} checked without the others: {outcome.error:.1e}")


def _transform(model: nn.Module, task: Task, analysis: Analysis, undo: Undo) -> Step:
    recipe, args, kwargs, scope = task.recipe, task.args, task.kwargs, task.scope
    report = report_of(model, analysis)
    report.recipe = recipe.name
    parameters = parameter_count(model)
    if on_meta(model):
        report.notes.append(NOTE)
    work, missed, effects, ran = Installer(model, recipe, undo, report), (), list[Effect](), None
    if in_graphs(recipe):
        graphs = replace(task, recipe=without(recipe, in_python=True))
        work, missed = place(model, graphs, analysis, undo, report)
        report.notes = list(dict.fromkeys(report.notes))
        if reason := why_no_cache(model, work.effects, args, kwargs):
            _without_cache(model, reason, report, undo)
        report.graphs = work.graphs()
        report.passes = [*report.passes, *work.pass_rows()]
        report.totals = replace(report.totals, **work.cost_after(report))
        ran = measured(model, [], args, kwargs) if task.look else None
        if ran is not None and ran.flops is not None:
            report.totals = replace(report.totals, flops_after=ran.flops)
    if rest := without(recipe, in_python=False).rewrites:
        effects = install(model, task, rest, analysis.sites, undo, report)
    active = active_count(model, analysis.sites, ran)
    report.totals = replace(
        report.totals, parameters_before=parameters, parameters_after=parameter_count(model), active_after=active
    )
    return Step(
        recipe,
        scope,
        (args, kwargs),
        (*work.effects, *effects),
        report,
        tuple(undo.caches),
        tuple(undo.switches),
        missed,
    )


def _without_cache(model: nn.Module, reason: str, report: Report, undo: Undo) -> None:
    """Plain calls do without a KV cache from now on, and generate keeps the state of a decoder."""
    undo.caches += (settings := caches_off(model))
    if settings:
        report.notes.append(f"use_cache is off in the model's configuration from now on: {reason}")
    new = serve(model)
    undo.first += [partial(stop_serving, module) for module in new]
    if new:
        report.notes.append("generate goes through the derived decoder, whose state takes the place of a KV cache")


def _checked(report: Report, outcome: Checked) -> Report:
    rewrites = [replace(r, error=outcome.error) for r in report.rewrites]
    totals = replace(report.totals, max_error=outcome.error, contract=outcome.contract, contract_held=True)
    return replace(report, rewrites=rewrites, totals=totals, notes=[*report.notes, *outcome.notes])
