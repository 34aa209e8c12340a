"""build: from one call of a scope to an entry of its family: capture, canonicalize, find the sites, rewrite, verify."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx, nn

from gatecc.capture import capture
from gatecc.capture.checkpointing import no_checkpointing
from gatecc.capture.guards import LaterGuards
from gatecc.capture.reads import Seen, reads_of, recorded_reads, ties_of
from gatecc.errors import CaptureError, GateccError, GraphError
from gatecc.ir.boundary import held, settle
from gatecc.ir.cost import Cost, cost
from gatecc.ir.edit import Editor, Replace
from gatecc.ir.functions import entries
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program, copy_for, window
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.site import Attention, Site, Value
from gatecc.ir.verify import Before, Suspect, verify
from gatecc.ir.weights import Effect
from gatecc.passes.canonicalize import canonicalize
from gatecc.scope.family import Entry
from gatecc.scope.hooks import hooked
from gatecc.scope.masks import handed_down
from gatecc.scope.python_path import PythonPath, python_path
from gatecc.scope.state import Scope, base_forward
from gatecc.scope.variant import Variant
from gatecc.scope.widened import narrowed


@dataclass
class Built:
    """What one build made: the entry, the program before variants were cut from it, the steps, and times in seconds.

    ``canonical`` is the program before the rewrites, kept where they are to be done again for each layer.
    """

    entry: Entry
    program: Program
    editors: list[list[Editor]]  # of each application
    python: PythonPath
    cost_before: Cost
    canonical: Program | None = None
    seconds: dict[str, float] = field(default_factory=dict[str, float])

    def effects(self, first: int = 0) -> list[Effect]:
        """What the applications from the ``first`` on do to weights, in order."""
        return [effect for editors in self.editors[first:] for editor in editors for effect in editor.weights]


Observer = Callable[[str, Program], None]


def build(
    module: nn.Module,
    state: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observe: Observer | None = None,
    seen: Seen | None = None,
    hooks: Collection[str] | None = None,
) -> Built:
    """Capture one call of a scope and do its rewrites. Raises CaptureError; GraphError names rewrite, site and line.

    ``hooks`` are the submodules whose hooks the variant calls, by default those that have hooks which act now.
    ``observe(stage, program)`` is called with "before" on the canonical graph and "after" on the rewritten one.
    ``seen`` is filled with the attributes that the capture read, also of one that failed.
    """
    with narrowed(module, state.widened):
        hooks = hooked(module) if hooks is None else hooks
        return _build(module, state, args, kwargs, observe, {} if seen is None else seen, hooks)


def _build(
    module: nn.Module,
    state: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observe: Observer | None,
    seen: Seen,
    hooks: Collection[str],
) -> Built:
    clock = _Clock()
    with recorded_reads(module, seen), no_checkpointing(state.fqn or type(module).__name__):
        program = capture(
            module, args, kwargs, fqn=state.fqn, forward=base_forward(module), hooked=hooks, functions=True
        )
    clock.lap("capture")
    canonicalize(program)
    settle(program)
    clock.lap("canonicalize")
    plain = Variant(program, reads_of(seen), ties_of(module))
    clock.lap("print")
    before = cost(program)
    if observe:
        observe("before", program)
    canonical = None if same_for_layers(state) else copy_for(program, module, state.fqn, program.example)
    return _rewritten(program, state, plain, before, canonical, clock, observe)


def same_for_layers(state: Scope) -> bool:
    """Whether the rewrites of a scope read nothing of their layer, so that they need not be done again for others."""
    return all(application.rewrite.same_for_layers for application in state.applied)


def rebuild(
    module: nn.Module, state: Scope, leader: Built, leaves: list[torch.Tensor], observe: Observer | None = None
) -> Built:
    """The rewrites of a leader's graph done again for another layer that it was proved for, from that layer's weights.

    The entry is the leader's own if the graph came out the same.
    """
    assert leader.canonical is not None
    clock = _Clock()
    with narrowed(module, state.widened):
        program = copy_for(leader.canonical, module, state.fqn, leaves)
        if observe:
            observe("before", program)
        built = _rewritten(program, state, leader.entry.plain, leader.cost_before, None, clock, observe)
    if built.entry.variant.same_as(leader.entry.variant):
        leader.entry.layers.add(module)
        built.entry = leader.entry
    return built


def _rewritten(
    program: Program,
    state: Scope,
    plain: Variant,
    before: Cost,
    canonical: Program | None,
    clock: _Clock,
    observe: Observer | None,
) -> Built:
    """Match, rewrite and print a canonical program."""
    sites = find_sites(program).sites
    clock.lap("match")
    editors = rewrite_program(program, state, sites)
    clock.lap("rewrite")
    flat = [editor for of_one in editors for editor in of_one]
    path = python_path(program, flat, [s for s in sites if isinstance(s, Attention)], _argument_paths(program))
    entry = Entry(Variant(program, plain.reads, plain.ties, hooks=True), plain, seconds=clock.seconds)
    clock.lap("print")
    if observe:
        observe("after", program)
    entry.layers.add(program.module)
    return Built(entry, program, editors, path, before, canonical, clock.seconds)


def rewrite_program(program: Program, state: Scope, sites: list[Site]) -> list[list[Editor]]:
    """Do every application of a scope on a program, verifying after each of them."""
    editors: list[list[Editor]] = []
    taken: set[str] = set()
    sizes = LaterGuards(program.placeholders)
    sites = [handed_down(site, program, state.masks) for site in sites]
    work = Sites(sites)
    for application in state.applied:
        places = set(application.sites)
        kind = application.rewrite.site.kind
        found = [s for s in sites if s.kind == kind and (program.relative_name(s.owner), s.ordinal) in places]
        for owner, ordinal in places - {(program.relative_name(s.owner), s.ordinal) for s in found}:
            raise CaptureError(
                "a rewritten site does not exist in this kind of call",
                where=program.full_name(owner) or "model",
                found=f"no {kind} site #{ordinal} in the graph of this call",
                do="call the model as in the example inputs, or transform it with example inputs of this kind",
            )
        editors.append(apply(application.rewrite, program, found, state.own, taken, work))
    seen = held(program.boundaries) | entries(program.functions)
    program.graph.eliminate_dead_code(lambda node: node in seen or node.is_impure())
    program.guards += [guard for guard in sizes.found() if guard not in program.guards]
    return editors


class Sites:
    """All sites of a program, with the values that they have after the edits so far."""

    def __init__(self, sites: list[Site]) -> None:
        self._sites = sites
        self._moved: dict[fx.Node, fx.Node] = {}
        self._gone: set[fx.Node] = set()

    def now(self) -> list[Site]:
        """The sites as they are now."""
        return [self.of(site) for site in self._sites] if self._moved else self._sites

    def of(self, site: Site) -> Site:
        """One site as it is now, without the values that an edit did away with."""
        if not any(value.node in self._moved or value.node in self._gone for value in site.values.values()):
            return site
        values = {name: Value(self._last(value.node), value.axes) for name, value in site.values.items()}
        return replace(site, values={name: value for name, value in values.items() if value.node not in self._gone})

    def note(self, edit: Editor) -> None:
        """Remember what an edit replaced for all readers, and what it erased."""
        self._moved.update({s.old: s.new for s in edit.steps if isinstance(s, Replace) and not s.some})
        self._gone |= edit.erased

    def _last(self, node: fx.Node) -> fx.Node:
        while node in self._moved:
            node = self._moved[node]
        return node


def apply(
    rewrite: Rewrite, program: Program, sites: list[Site], own: set[str], taken: set[str], work: Sites
) -> list[Editor]:
    """One rewrite at its sites in a program, verified structurally."""
    before = Before.of(program)
    replaces = replaced_by(rewrite, program, sites)
    editors: list[Editor] = []
    for site in map(work.of, sites):
        edit = Editor(program, site, rewrite.name, own, taken, sites=work.now())
        try:
            rewrite.rewrite(site, edit)
        except GateccError:
            raise
        except Exception as e:
            place = f"{rewrite} at {site.key} {site.line}".strip()
            found = f"{e}\n{window(edit.site_node)}"
            raise GraphError(f"the rewrite raised {type(e).__name__}", where=place, found=found) from e
        editors.append(edit)
        work.note(edit)
    inserted = {node for edit in editors for node in edit.inserted}
    lost = {name for edit in editors for name in edit.lost}
    hidden = {number for edit in editors for number in edit.hidden}
    verify(program, before, Suspect(str(rewrite), sites, inserted, rewrite.loses_buffers, replaces | lost, own, hidden))
    return editors


def replaced_by(rewrite: Rewrite, program: Program, sites: list[Site]) -> set[str]:
    """What a rewrite may leave unread: the owners of its sites, and weights of theirs that lie elsewhere."""
    if not rewrite.loses_parameters:
        return set()
    weights = [w for site in sites for w in site.weights.values()]
    names = {site.owner for site in sites} | {n for w in weights for n in (w.fqn, w.bias) if n}
    return {program.relative_name(name) for name in names}


def _argument_paths(program: Program) -> dict[Any, tuple[Any, ...]]:
    return dict(zip(program.placeholders, program.paths, strict=True))


class _Clock:
    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.process_time()

    def lap(self, name: str) -> None:
        now = time.process_time()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
