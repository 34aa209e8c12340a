"""transform: from a model and a recipe to a model of the same class whose chosen submodules run rewritten graphs."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import nn

from gatecc.analysis import Inputs, analyse, check_model, evaluation, parameter_count, report_of
from gatecc.capture.adapters import switch_caches
from gatecc.capture.record import RecordedCall, record_calls
from gatecc.capture.signature import OpaqueArgumentError, split_inputs
from gatecc.check import Checked, check, reference
from gatecc.errors import ArgumentError, CaptureError, GraphError, SiteRefusedError, UnsupportedModelError
from gatecc.ir.edit import NewModule, WeightStep
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.widen import Rows, WidenWeight
from gatecc.planning import Plan, called_modules, plans_of
from gatecc.recipes import resolve
from gatecc.report import GraphDump, GraphPair, PassRow, Report, RewriteRow
from gatecc.scope.build import Built, build, install_weights, scale
from gatecc.scope.family import Family, proves, structure
from gatecc.scope.scope import (
    Scope,
    base_class,
    base_forward,
    call_key,
    install,
    remove,
    scope_of,
    scopes,
)
from gatecc.scope.widened import narrow, narrowed

HISTORY = "_gatecc_history"


@dataclass(frozen=True, eq=False)
class Step:
    """One transform of a model: what save replays and revert undoes. Names are FQNs in the model."""

    recipe: Recipe
    scope: str
    inputs: tuple[tuple[Any, ...], dict[str, Any]]
    modules: tuple[str, ...]  # new submodules
    scaled: tuple[tuple[str, float], ...]  # parameters and the powers of two that they were multiplied by
    report: Report
    widened: tuple[tuple[str, Rows], ...] = ()  # parameters that hold new rows
    caches: tuple[Any, ...] = ()  # configurations whose use_cache was switched off


@dataclass
class _Undo:
    """How to leave an in-place model as it was if something fails half-way."""

    states: list[tuple[nn.Module, Scope | None]] = field(default_factory=list[tuple[nn.Module, Scope | None]])
    weights: list[tuple[nn.Module, WeightStep]] = field(default_factory=list[tuple[nn.Module, WeightStep]])
    caches: list[Any] = field(default_factory=list[Any])

    def run(self) -> None:
        """Take everything back."""
        _caches_on(self.caches)
        for module, step in reversed(self.weights):
            undo_weight(module, step)
        for module, state in reversed(self.states):
            remove(module)
            if state is not None:
                install(module, state)
        self.weights.clear()
        self.states.clear()
        self.caches.clear()


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

    Raises UnknownRecipeError, EmptySelectionError, ExampleInputsError, UnsupportedModelError, CaptureError, GraphError,
    ContractError. `last_report(result)` tells what was done.
    """
    wanted = resolve(recipe)
    args, kwargs = split_inputs(example_inputs)
    check_model(model)
    if scope not in ("auto", "model"):
        raise ArgumentError("unknown scope", found=repr(scope), expected='"auto" or "model"')
    undo = _Undo()
    with evaluation(model):
        before = reference(model, args, kwargs) if verify else None
    target = model if inplace else _copy(model)
    try:
        with evaluation(target):
            step = _transform(target, wanted, args, kwargs, scope, undo)
            if before is not None:
                outcome = check(before, target, wanted, args, kwargs)
                step = replace(step, report=_checked(step.report, outcome))
    except BaseException:
        undo.run()
        raise
    vars(target)[HISTORY] = (*history(model), step)
    return target


def last_report(model: nn.Module) -> Report:
    """The report of the last transform of a model. Raises ArgumentError for a model that was not transformed."""
    steps = history(model)
    if not steps:
        raise ArgumentError("this model has no report", found=type(model).__name__, do="gatecc.inspect(model, inputs)")
    return steps[-1].report


def history(model: nn.Module) -> tuple[Step, ...]:
    """The transforms that a model went through, first to last."""
    return vars(model).get(HISTORY, ())


def revert(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Undo every transform of a model: its parameters, outputs and state dict are bitwise those of before (T8).

    Changes that training made to the model's own parameters stay; the new parameters are dropped.
    """
    target = model if inplace else copy.deepcopy(model)
    for step in reversed(history(target)):
        _caches_on(step.caches)
        for fqn in step.modules:
            _remove_module(target, fqn)
        for fqn, factor in step.scaled:
            _scale(target, fqn, 1 / factor)
        for fqn, rows in step.widened:
            narrow(target, fqn, rows)
    for _, module, _ in list(scopes(target)):
        remove(module)
    vars(target).pop(HISTORY, None)
    return target


def _copy(model: nn.Module) -> nn.Module:
    try:
        return copy.deepcopy(model)
    except Exception as e:
        raise ArgumentError(
            "the model cannot be copied",
            found=f"{type(e).__name__}: {e}",
            do="pass inplace=True to rewrite it as it is",
        ) from e


def _transform(
    model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], scope: str, undo: _Undo
) -> Step:
    analysis = analyse(model, args, kwargs)
    report = report_of(model, analysis)
    report.recipe = recipe.name
    parameters = parameter_count(model)
    called = called_modules(model, args, kwargs)
    too_small: set[str] = set()
    while True:
        plans, left_out = plans_of(model, recipe, analysis, scope, called, too_small)
        work = _Installer(model, recipe, undo, report)
        failed = _install(work, plans, {p.fqn for p in analysis.programs}, args, kwargs)
        if not failed:
            break
        too_small |= failed
        undo.run()
        report.rewrites.clear()
    report.refusals = [*report.refusals, *left_out]
    if reason := _keeps_no_cache(model):
        undo.caches += switch_caches(model)
        if undo.caches:
            report.notes.append(f"use_cache is off in the model's configuration from now on: {reason}")
    report.graphs = work.graphs()
    report.passes = [*report.passes, *work.pass_rows()]
    report.totals = replace(
        report.totals, parameters_before=parameters, parameters_after=parameter_count(model), **work.cost_after(report)
    )
    return Step(
        recipe,
        scope,
        (args, kwargs),
        tuple(work.modules),
        tuple(work.scaled),
        report,
        tuple(work.widened.items()),
        tuple(undo.caches),
    )


def _keeps_no_cache(model: nn.Module) -> str:
    """Why calls with a KV cache cannot be served, "" if they can."""
    for fqn, _, state in scopes(model):
        if not fqn:
            return "the model runs as one graph, and a graph holds no cache"
        if state.python.refused:
            return state.python.refused
    return ""


def _caches_on(configurations: Sequence[Any]) -> None:
    for config in configurations:
        config.use_cache = True


def _install(
    work: _Installer, plans: list[Plan], largest: set[str], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> set[str]:
    """Install all plans. Returns the scopes that turned out too small: one that failed, and the others of its class.

    A submodule on its own can hide what its surroundings prove: sizes that are constants of the model become inputs.
    """
    calls, _ = record_calls(work.model, [p.fqn for p in plans], args, kwargs)
    for plan in sorted(plans, key=lambda p: -p.fqn.count(".") - bool(p.fqn)):
        try:
            work.install(plan, calls[plan.fqn])
        except (CaptureError, SiteRefusedError) as e:
            if plan.fqn in largest:
                raise
            work.report.notes.append(f"{plan.fqn}: rewritten in the graph of the whole model; alone: {e.found}")
            cls = base_class(work.model.get_submodule(plan.fqn))
            return {p.fqn for p in plans if base_class(work.model.get_submodule(p.fqn)) is cls} - largest
    return set()


@dataclass
class _Installer:
    """Builds and installs scopes; layers of one structure are built once and proved for each of the others."""

    model: nn.Module
    recipe: Recipe
    undo: _Undo
    report: Report
    leaders: dict[Any, list[tuple[Family, Built]]] = field(default_factory=dict[Any, "list[tuple[Family, Built]]"])
    pairs: dict[int, tuple[list[str], list[GraphDump]]] = field(
        default_factory=dict[int, "tuple[list[str], list[GraphDump]]"]
    )
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    modules: list[str] = field(default_factory=list[str])
    scaled: list[tuple[str, float]] = field(default_factory=list[tuple[str, float]])
    widened: dict[str, Rows] = field(default_factory=dict[str, Rows])
    done: set[tuple[type, str]] = field(default_factory=set[tuple[type, str]])  # weight steps by kind and FQN

    def install(self, plan: Plan, calls: list[RecordedCall]) -> None:
        """Make one planned scope."""
        clock = time.process_time()
        module = self.model.get_submodule(plan.fqn)
        if "forward" in vars(module):
            raise UnsupportedModelError(
                "the module has a forward of its own, which hides that of its class: a rewrite of it would never run",
                where=plan.fqn or type(module).__name__,
                found="forward in vars(module); accelerate's dispatch hooks and monkey patches put it there",
                do="take it away first: remove_hook_from_module of accelerate.hooks, or del module.forward",
            )
        old = scope_of(module)
        self.undo.states.append((module, old))
        applied = (*(old.applied if old else ()), *plan.applied)
        kind = (structure(module), applied)
        state = Scope(plan.fqn, applied)
        if old:
            state.own, state.widened = set(old.own), dict(old.widened)
        install(module, state)
        made: dict[str, int] = {}
        for call in calls:
            built = self._one(module, state, (kind, _key(module, call)), call)
            made |= self._weights(module, state, built.weights(first=len(old.applied) if old else 0))
        ms = (time.process_time() - clock) * 1e3
        self._rows(plan, made, ms)

    def _one(self, module: nn.Module, state: Scope, kind: Any, call: RecordedCall) -> Built:
        known = self.leaders.setdefault(kind, [])
        for family, built in known:
            if self._share(module, state, family, built, call):
                self.pairs[id(built)][0].append(state.fqn)
                return built
        known.append((state.family, self._lead(module, state, call)))
        return known[-1][1]

    def _lead(self, module: nn.Module, state: Scope, call: RecordedCall) -> Built:
        dumps: list[GraphDump] = []
        before = dict(module.named_modules())
        own = set(state.own)
        try:
            with _gradients():
                built = build(
                    module, state, call.args, call.kwargs, lambda _, program: dumps.append(GraphDump.of(program))
                )
        finally:
            for path in state.own - own:
                if path not in before:
                    self.undo.weights.append((module, NewModule(path, nn.Identity)))
        with _gradients():
            key, _ = call_key(module, call.args, call.kwargs)
        state.family.add(key, built.entry)
        state.trusted.append(built.entry)
        state.python = built.python
        self.pairs[id(built)] = ([state.fqn], dumps)
        for name, seconds in built.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        return built

    def _share(self, module: nn.Module, state: Scope, family: Family, built: Built, call: RecordedCall) -> bool:
        clock = time.process_time()
        with _gradients():
            key, leaves = call_key(module, call.args, call.kwargs)
        with narrowed(module, state.widened):
            held = proves(built.entry, module, base_forward(module), call.args, call.kwargs, leaves)
        self.seconds["share"] = self.seconds.get("share", 0.0) + time.process_time() - clock
        if not held:
            return False
        if not state.family.entries:
            state.family = family
        elif built.entry not in state.family.find(key, leaves):  # another kind of call of the same layer
            state.family.add(key, built.entry)
        state.python = built.python
        state.trusted.append(built.entry)
        return True

    def _weights(self, module: nn.Module, state: Scope, steps: list[WeightStep]) -> dict[str, int]:
        """New parameters and changed weights of one layer, once even if it is called several times."""
        names = {(type(step), state_path(state, step)) for step in steps}
        if names & self.done:
            return {}
        self.done |= names
        self._refuse_tied(state, steps)
        new = [s for s in steps if isinstance(s, NewModule) and s.path not in state.own]
        self.undo.weights.extend((module, s) for s in new)
        made = install_weights(module, steps)
        for step in steps:
            if isinstance(step, NewModule):
                state.own.add(step.path)
                self.modules.append(state_path(state, step))
                continue
            self.undo.weights.append((module, step))
            if isinstance(step, WidenWeight):
                state.widened[step.path] = step.rows
                self.widened[state_path(state, step)] = step.rows
            else:
                self.scaled.append((state_path(state, step), step.factor))
        return made

    def _refuse_tied(self, state: Scope, steps: list[WeightStep]) -> None:
        """A weight that another module reads too must not be changed for one of them."""
        for fqn in (state_path(state, step) for step in steps if not isinstance(step, NewModule)):
            weight = self.model.get_parameter(fqn)
            others = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight and n != fqn]
            if others:
                raise GraphError(
                    "the rewrite changes a weight that is tied to another",
                    where=fqn,
                    found=f"the same parameter is {', '.join(others)}",
                    do='use init="identity", which changes no weight of the model, or untie them first',
                )

    def _rows(self, plan: Plan, made: dict[str, int], ms: float) -> None:
        sites = [(a, place) for a in plan.applied for place in a.sites]
        for application, (owner, ordinal) in sites:
            full = ".".join(p for p in (plan.fqn, owner) if p)
            prefix = f"{owner}." if owner else ""
            new = {f"{plan.fqn}.{n}".lstrip("."): c for n, c in made.items() if n.startswith(prefix)}
            self.report.rewrites.append(
                RewriteRow(
                    rewrite=application.rewrite.name,
                    recipe=self.recipe.name,
                    site=f"{full}#{ordinal}",
                    scope=plan.fqn,
                    contract=str(application.rewrite.contract()),
                    new_parameters=new,
                    ms=ms / len(sites),
                )
            )

    def graphs(self) -> list[GraphPair]:
        """Each distinct graph before and after, with the scopes that share it."""
        return [GraphPair(tuple(names), *dumps[:2]) for names, dumps in self.pairs.values()]

    def pass_rows(self) -> list[PassRow]:
        """Times per pass over all scopes."""
        return [PassRow(f"scopes: {name}", seconds * 1e3) for name, seconds in self.seconds.items()]

    def cost_after(self, report: Report) -> dict[str, int]:
        """FLOPs and bytes after: those before, plus what the rewritten graphs cost more than the plain ones."""
        from gatecc.ir.cost import cost

        flops, traffic = report.totals.flops_before or 0, report.totals.bytes_before or 0
        for _, built in (pair for pairs in self.leaders.values() for pair in pairs):
            count = len(self.pairs[id(built)][0])
            after = cost(built.program)
            flops += count * (after.flops - built.cost_before.flops)
            traffic += count * (after.bytes - built.cost_before.bytes)
        return {"flops_after": flops, "bytes_after": traffic}


def state_path(state: Scope, step: WeightStep) -> str:
    """The FQN in the model of what a weight step touches."""
    return f"{state.fqn}.{step.path}".lstrip(".")


def undo_weight(module: nn.Module, step: WeightStep) -> None:
    """Take back one weight step on a layer."""
    if isinstance(step, NewModule):
        _remove_module(module, step.path)
    elif isinstance(step, WidenWeight):
        narrow(module, step.path, step.rows)
    else:
        scale(module, step, 1 / step.factor)


def _remove_module(root: nn.Module, path: str) -> None:
    holder, _, name = path.rpartition(".")
    root.get_submodule(holder)._modules.pop(name, None)


def _scale(model: nn.Module, fqn: str, factor: float) -> None:
    with torch.no_grad():
        model.get_parameter(fqn).mul_(factor)


def _key(module: nn.Module, call: RecordedCall) -> Any:
    with _gradients():
        try:
            return call_key(module, call.args, call.kwargs)[0]
        except OpaqueArgumentError as e:
            raise CaptureError(
                "the call of a scope cannot become a graph",
                found=str(e),
                do="take hooks inside of it off while transforming (handle.remove()); pass tensors and constants only",
            ) from e


def _gradients() -> torch.set_grad_enabled:
    """Captures are made with gradients on: a graph taken without them forgets which regions had none."""
    return torch.set_grad_enabled(True)


def _checked(report: Report, outcome: Checked) -> Report:
    rewrites = [replace(r, error=outcome.error) for r in report.rewrites]
    totals = replace(report.totals, max_error=outcome.error, contract=outcome.contract, contract_held=True)
    return replace(report, rewrites=rewrites, totals=totals, notes=[*report.notes, *outcome.notes])


def names(steps: Iterable[Step]) -> list[str]:
    """The recipe names of a history."""
    return [s.recipe.name for s in steps]
