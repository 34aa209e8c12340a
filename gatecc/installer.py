"""Installer: builds and installs the scopes of a transform; Undo takes them all back."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gatecc.capture.record import RecordedCall
from gatecc.capture.signature import OpaqueArgumentError
from gatecc.errors import CaptureError, GraphError, UnsupportedModelError
from gatecc.ir.edit import NewModule, WeightStep
from gatecc.ir.rewrite import Recipe
from gatecc.ir.widen import Rows, WidenWeight
from gatecc.planning import Plan
from gatecc.report import GraphDump, GraphPair, PassRow, Report, RewriteRow
from gatecc.scope.build import Built, build, install_weights, scale
from gatecc.scope.family import Family, proves, structure
from gatecc.scope.fast_paths import Switch, fast_paths_on
from gatecc.scope.key import call_key
from gatecc.scope.scope import (
    Scope,
    base_forward,
    install,
    remove,
    scope_of,
)
from gatecc.scope.widened import narrow, narrowed


@dataclass
class Undo:
    """How to leave an in-place model as it was if something fails half-way."""

    states: list[tuple[nn.Module, Scope | None]] = field(default_factory=list[tuple[nn.Module, Scope | None]])
    weights: list[tuple[nn.Module, WeightStep]] = field(default_factory=list[tuple[nn.Module, WeightStep]])
    caches: list[Any] = field(default_factory=list[Any])
    switches: list[Switch] = field(default_factory=list[Switch])

    def run(self, model: nn.Module) -> None:
        """Take everything back."""
        caches_on(self.caches)
        fast_paths_on(model, self.switches)
        for module, step in reversed(self.weights):
            undo_weight(module, step)
        for module, state in reversed(self.states):
            remove(module)
            if state is not None:
                install(module, state)
        self.weights.clear()
        self.states.clear()
        self.caches.clear()
        self.switches.clear()


@dataclass
class Installer:
    """Builds and installs scopes; layers of one structure are built once and proved for each of the others."""

    model: nn.Module
    recipe: Recipe
    undo: Undo
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
        remove_module(module, step.path)
    elif isinstance(step, WidenWeight):
        narrow(module, step.path, step.rows)
    else:
        scale(module, step, 1 / step.factor)


def remove_module(root: nn.Module, path: str) -> None:
    """Take a submodule away, if it is there."""
    holder, _, name = path.rpartition(".")
    root.get_submodule(holder)._modules.pop(name, None)


def caches_on(configurations: Sequence[Any]) -> None:
    """Switch the caches of configurations back on."""
    for config in configurations:
        config.use_cache = True


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
