"""Installer: builds and installs the scopes of a transform; Undo takes them all back."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gatecc.capture.adapters import Setting
from gatecc.capture.record import RecordedCall
from gatecc.capture.signature import OpaqueArgumentError, flatten
from gatecc.engine.caches import caches_on
from gatecc.engine.plan import Plan
from gatecc.errors import CaptureError, GraphError, UnsupportedModelError
from gatecc.ir.program import Program, origin
from gatecc.ir.rewrite import Recipe
from gatecc.ir.weights import Effect, NewModule, joined, suspended
from gatecc.pipeline import Stage
from gatecc.report import EffectRow, GraphDump, GraphPair, PassRow, Report, RewriteRow
from gatecc.scope.build import Built, Place, build, rebuild, same_for_layers
from gatecc.scope.family import Family, proves, structure
from gatecc.scope.fast_paths import Switch, fast_paths_on
from gatecc.scope.key import call_key
from gatecc.scope.scope import install, remove
from gatecc.scope.state import Scope, base_forward, forward_hides_class, scope_of


@dataclass
class Undo:
    """How to leave an in-place model as it was if something fails half-way."""

    states: list[tuple[nn.Module, Scope | None]] = field(default_factory=list[tuple[nn.Module, Scope | None]])
    effects: list[tuple[nn.Module, Effect]] = field(default_factory=list[tuple[nn.Module, Effect]])
    caches: list[Setting] = field(default_factory=list[Setting])
    first: list[Callable[[], None]] = field(default_factory=list[Callable[[], None]])  # what doors did afterwards
    classes: list[tuple[nn.Module, type[nn.Module]]] = field(default_factory=list[tuple[nn.Module, type[nn.Module]]])
    switches: list[Switch] = field(default_factory=list[Switch])

    def run(self, model: nn.Module) -> None:
        """Take everything back."""
        caches_on(self.caches)
        for take_back in self.first:
            take_back()
        fast_paths_on(model, self.switches)
        for module, effect in reversed(self.effects):
            effect.undo(module)
        for module, state in reversed(self.states):
            remove(module)
            if state is not None:
                install(module, state)
        for module, cls in self.classes:  # of those that were served before, which are scopes by themselves now
            module.__class__ = cls
        self.effects.clear()
        self.states.clear()
        self.caches.clear()
        self.first.clear()
        self.switches.clear()


@dataclass
class Shared:
    """A distinct graph: what was built, the scopes that run it, and the graph before and after."""

    built: Built
    scopes: list[str]
    dumps: list[GraphDump]


@dataclass(frozen=True)
class Done:
    """An effect that was done on a layer, for a rewrite at a site: as plain data, and the new elements by parameter."""

    place: Place
    effect: Effect
    made: dict[str, int]

    def row(self) -> EffectRow:
        """What a report says of it."""
        return EffectRow(self.effect.path, self.effect.describe(), sum(self.made.values()))


@dataclass
class Installer:
    """Builds and installs scopes; layers of one structure are built once and proved for each of the others.

    ``programs``: the graphs of the model without the rewrites, which show who else reads a weight.
    """

    model: nn.Module
    recipe: Recipe
    undo: Undo
    report: Report
    programs: Sequence[Program] = ()
    leaders: dict[Any, list[tuple[Family, Built]]] = field(default_factory=dict[Any, "list[tuple[Family, Built]]"])
    shared: dict[int, Shared] = field(default_factory=dict[int, "Shared"])  # by the id of what was built
    seconds: dict[str, float] = field(default_factory=dict[str, float])
    effects: list[Effect] = field(default_factory=list[Effect])  # on the model's weights, in order, as plain data

    def install(self, plan: Plan, calls: list[RecordedCall]) -> None:
        """Make one planned scope."""
        clock = time.process_time()
        module = self.model.get_submodule(plan.fqn)
        if forward_hides_class(module):
            raise UnsupportedModelError(
                "the module has a forward of its own, which hides that of its class: a rewrite of it would never run",
                where=plan.fqn or type(module).__name__,
                found="forward in vars(module); accelerate puts it there, and monkey patches do",
                do="take it away first: accelerator.unwrap_model(model, keep_fp32_wrapper=False), "
                "remove_hook_from_module of accelerate.hooks, or del module.forward",
            )
        old = scope_of(module)
        self.undo.states.append((module, old))
        applied = (*(old.applied if old else ()), *plan.applied)
        masks = {**(old.masks if old else {}), **plan.masks}
        kind = (structure(module), applied, tuple(sorted(masks.items(), key=str)))
        state = Scope(plan.fqn, applied, masks=masks)
        if old:
            state.own, state.changes = set(old.own), list(old.changes)
        install(module, state)
        done: list[Done] = []
        for call in calls:
            built = self._one(module, state, (kind, _key(module, call)), call)
            done += self._weights(module, state, built.effects(first=len(old.applied) if old else 0))
            self._enter(module, state, built, call)
        ms = (time.process_time() - clock) * 1e3
        self._rows(plan, done, ms)

    def _one(self, module: nn.Module, state: Scope, kind: Any, call: RecordedCall) -> Built:
        known = self.leaders.setdefault(kind, [])
        for family, built in known:
            mine = self._share(module, state, family, built, call)
            if mine is not None:
                return mine
        known.append((state.family, self._lead(module, state, call)))
        return known[-1][1]

    def _lead(self, module: nn.Module, state: Scope, call: RecordedCall, leader: Built | None = None) -> Built:
        """Build a layer: from a capture of its own, or on the graph of a leader that was proved to be its function."""
        dumps: list[GraphDump] = []
        before = dict(module.named_modules())
        own = set(state.own)

        def observe(stage: Stage) -> None:
            if stage.name in ("match", "clean"):
                dumps.append(GraphDump.of(stage.program))

        with _gradients():
            try:
                if leader is None:
                    built = build(module, state, call.args, call.kwargs, observe)
                else:
                    built = rebuild(module, state, leader, flatten(call.args, call.kwargs)[1], observe)
            finally:
                new = [path for path in state.own - own if path not in before]
                self.undo.effects.extend((module, NewModule(path)) for path in new)
        for name, seconds in built.seconds.items():
            self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        if leader is None or built.entry is not leader.entry:
            self._trust(state, built)
            self.shared[id(built)] = Shared(built, [state.fqn], dumps)
        return built

    def _share(
        self, module: nn.Module, state: Scope, family: Family, leader: Built, call: RecordedCall
    ) -> Built | None:
        """What a leader's graph is for another layer, if it is proved to be that layer's function; else None."""
        clock = time.process_time()
        leaves = flatten(call.args, call.kwargs)[1]
        with suspended(module, state.changes):
            held = proves(leader.entry, module, base_forward(module), call.args, call.kwargs, leaves)
        self.seconds["share"] = self.seconds.get("share", 0.0) + time.process_time() - clock
        if not held:
            return None
        mine = leader if same_for_layers(state) else self._lead(module, state, call, leader)
        if mine.entry is not leader.entry:  # the rewrite made another graph of this layer: it shares none
            return mine
        if not state.family.entries:
            state.family = family
        self._trust(state, mine)
        self.shared[id(leader)].scopes.append(state.fqn)
        return mine

    def _enter(self, module: nn.Module, state: Scope, built: Built, call: RecordedCall) -> None:
        """Enter what was built under the key of the calls to come: the new modules and rows are part of it."""
        with _gradients():
            key, leaves = call_key(module, call.args, call.kwargs)
        if built.entry not in state.family.find(key, leaves):
            state.family.add(key, built.entry)

    def _trust(self, state: Scope, built: Built) -> None:
        state.python = built.python
        state.trust(built.entry)

    def _weights(self, module: nn.Module, state: Scope, effects: list[tuple[Place, Effect]]) -> list[Done]:
        """Do the effects on one layer, once even if it is called several times."""
        placed = [effect.placed(state.fqn) for _, effect in effects]
        known = [effect.to_json() for effect in self.effects]
        if any(effect.to_json() in known for effect in placed):
            return []
        self._refuse_tied(placed, state.fqn)
        done: list[Done] = []
        for (place, effect), record in zip(effects, placed, strict=True):
            self.undo.effects.append((module, effect))
            done.append(Done(place, record, effect.apply(module)))
            effect.note(state)
            self.effects.append(record)
        return done

    def _refuse_tied(self, effects: list[Effect], scope: str) -> None:
        """A weight that another module reads too, by another name or past its owner, must not be changed for one."""
        changed = {fqn for effect in effects for fqn in effect.changed(self.model)}
        for fqn in sorted(changed):
            weight = self.model.get_parameter(fqn)
            names = [n for n, p in self.model.named_parameters(remove_duplicate=False) if p is weight]
            others = [n for n in names if n not in changed]
            readers = [origin(node) for p in self.programs for node in p.readers(fqn)]
            outside = [o for o in readers if scope and not f"{o.owner}.".startswith(f"{scope}.")]
            found = f"the same parameter is {', '.join(others)}" if others else ""
            if not others and outside:
                found = "it is read by " + ", ".join(f"{o.owner or 'the model'} {o.line}".strip() for o in outside)
            if found:
                raise GraphError(
                    "the rewrite changes a weight that is tied to another",
                    where=fqn,
                    found=found,
                    do='use init="identity", which changes no weight of the model, or untie them first',
                )

    def _rows(self, plan: Plan, done: list[Done], ms: float) -> None:
        sites = [(number, place) for number, a in enumerate(plan.applied) for place in a.sites]
        for number, (owner, ordinal) in sites:
            application = plan.applied[number]
            mine = [one for one in done if one.place == (number, owner, ordinal)]
            self.report.rewrites.append(
                RewriteRow(
                    rewrite=application.rewrite.name,
                    recipe=self.recipe.name,
                    site=f"{joined(plan.fqn, owner)}#{ordinal}",
                    scope=plan.fqn,
                    contract=str(application.rewrite.contract()),
                    new_parameters={joined(plan.fqn, n): size for one in mine for n, size in one.made.items()},
                    effects=tuple(one.row() for one in mine),
                    ms=ms / len(sites),
                )
            )

    def graphs(self) -> list[GraphPair]:
        """Each distinct graph before and after, with the scopes that share it."""
        return [GraphPair(tuple(one.scopes), *one.dumps[:2]) for one in self.shared.values()]

    def pass_rows(self) -> list[PassRow]:
        """Times per pass over all scopes."""
        return [PassRow(f"scopes: {name}", seconds * 1e3) for name, seconds in self.seconds.items()]

    def cost_after(self, report: Report) -> dict[str, int]:
        """FLOPs and bytes after: those before, plus what the rewritten graphs cost more than the plain ones."""
        from gatecc.pipeline.cost import cost

        flops, traffic = report.totals.flops_before or 0, report.totals.bytes_before or 0
        for one in self.shared.values():
            count, before, after = len(one.scopes), one.built.cost_before, cost(one.built.program)
            flops += count * (after.flops - before.flops)
            traffic += count * (after.bytes - before.bytes)
        return {"flops_after": flops, "bytes_after": traffic}


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
