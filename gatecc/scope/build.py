"""build: from one call of a scope to an entry of its family: capture, canonicalize, find the sites, rewrite, verify."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from gatecc.capture import capture
from gatecc.capture.checkpointing import no_checkpointing
from gatecc.capture.reads import Seen, reads_of, recorded_reads, ties_of
from gatecc.ir.edit import Editor
from gatecc.ir.program import Program, copy_for
from gatecc.ir.site import Attention
from gatecc.ir.weights import Effect, suspended
from gatecc.pipeline import Observer, Prepared, Times, apply, prepare
from gatecc.pipeline.cost import Cost, cost
from gatecc.scope.family import Entry
from gatecc.scope.hooks import hooked
from gatecc.scope.masks import handed_down
from gatecc.scope.python_path import PythonPath, python_path
from gatecc.scope.state import Scope, base_forward
from gatecc.scope.variant import Variant

Place = tuple[int, str, int]  # the number of an application, the owner relative to the scope, the ordinal of the site


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

    def effects(self, first: int = 0) -> list[tuple[Place, Effect]]:
        """What the applications from the ``first`` on do to weights, in order, and which of them does it where."""
        return [
            ((number, self.program.relative_name(editor.site.owner), editor.site.ordinal), effect)
            for number, editors in enumerate(self.editors[first:])
            for editor in editors
            for effect in editor.weights
        ]


def build(
    module: nn.Module,
    state: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observer: Observer | None = None,
    seen: Seen | None = None,
    hooks: Collection[str] | None = None,
) -> Built:
    """Capture one call of a scope and do its rewrites. Raises CaptureError; GraphError names rewrite, site and line.

    ``hooks`` are the submodules whose hooks the variant calls, by default those that have hooks which act now.
    ``observer`` is told of each step of the pipeline.
    ``seen`` is filled with the attributes that the capture read, also of one that failed.
    """
    with suspended(module, state.changes):
        hooks = hooked(module) if hooks is None else hooks
        return _build(module, state, args, kwargs, observer, {} if seen is None else seen, hooks)


def _build(
    module: nn.Module,
    state: Scope,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    observer: Observer | None,
    seen: Seen,
    hooks: Collection[str],
) -> Built:
    times, clock = Times(then=observer), time.process_time()
    with recorded_reads(module, seen), no_checkpointing(state.fqn or type(module).__name__):
        program = capture(
            module, args, kwargs, fqn=state.fqn, forward=base_forward(module), hooked=hooks, functions=True
        )
    times.add("capture", time.process_time() - clock)
    prepared = prepare(program, times)
    clock = time.process_time()
    plain = Variant(program, reads_of(seen), ties_of(module))
    times.add("print", time.process_time() - clock)
    before = cost(program)
    canonical = None if same_for_layers(state) else copy_for(program, module, state.fqn, program.example)
    return _rewritten(prepared, state, plain, before, canonical, times)


def same_for_layers(state: Scope) -> bool:
    """Whether the rewrites of a scope read nothing of their layer, so that they need not be done again for others."""
    return all(application.rewrite.effects().same_for_layers for application in state.applied)


def rebuild(
    module: nn.Module, state: Scope, leader: Built, leaves: list[torch.Tensor], observer: Observer | None = None
) -> Built:
    """The rewrites of a leader's graph done again for another layer that it was proved for, from that layer's weights.

    The entry is the leader's own if the graph came out the same.
    """
    assert leader.canonical is not None
    times = Times(then=observer)
    with suspended(module, state.changes):
        prepared = prepare(copy_for(leader.canonical, module, state.fqn, leaves), times, canonical=True)
        built = _rewritten(prepared, state, leader.entry.plain, leader.cost_before, None, times)
    if built.entry.variant.same_as(leader.entry.variant):
        leader.entry.layers.add(module)
        built.entry = leader.entry
    return built


def _rewritten(
    prepared: Prepared, state: Scope, plain: Variant, before: Cost, canonical: Program | None, times: Times
) -> Built:
    """Rewrite a prepared program and print it."""
    program = prepared.program
    prepared.found = [handed_down(site, program, state.masks) for site in prepared.found]
    editors = apply(prepared, state.applied, times, own=state.own)
    clock = time.process_time()
    flat = [editor for of_one in editors for editor in of_one]
    attention = [site for site in prepared.found if isinstance(site, Attention)]
    gone = [path for edit in flat for path in edit.gone]
    path = python_path(program, flat, attention, _argument_paths(program))
    entry = Entry(Variant(program, *plain.without(gone), hooks=True), plain, seconds=times.seconds)
    times.add("print", time.process_time() - clock)
    entry.layers.add(program.module)
    return Built(entry, program, editors, path, before, canonical, times.seconds)


def _argument_paths(program: Program) -> dict[Any, tuple[Any, ...]]:
    return dict(zip(program.placeholders, program.paths, strict=True))
