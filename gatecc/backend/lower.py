"""lower: a Dynamo graph through gatecc's lowerings."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import tracing

from gatecc.backend.options import Options
from gatecc.capture.dynamo import dynamo_program, has_nested_graphs
from gatecc.ir.match import find_sites
from gatecc.ir.program import Program
from gatecc.ir.site import Refusal
from gatecc.ir.verify import Before, Suspect, verify
from gatecc.passes.lower import LOWERINGS, Lowering, Outcome, Settings
from gatecc.passes.lower.unspoken import unspoken
from gatecc.pipeline import Observer, canonical_form
from gatecc.pipeline.stage import step

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Lowered:
    """What a Dynamo graph became. ``graph`` takes the inputs that Dynamo gives; it is the very graph that came in if no
    lowering changed it. ``faults``: lowerings that failed, and why; they were left out. ``untouched``: why the graph
    was not looked at, empty if it was. ``training``: autograd will differentiate it. ``assumed``: places of the inputs
    whose values a proof read: buffers, which may change between calls."""

    graph: fx.GraphModule
    outcomes: tuple[Outcome, ...] = ()
    faults: tuple[tuple[str, str], ...] = ()
    untouched: str = ""
    training: bool = False
    assumed: tuple[int, ...] = ()


def lower(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    options: Options | None = None,
    observer: Observer | None = None,
) -> Lowered:
    """Lower a Dynamo graph. Nothing makes it fail: a lowering that does is left out, a graph that cannot be read goes
    on as it is, each with a logged reason.

    So does a graph with nested graphs (checkpointed regions, custom autograd functions, torch.cond): tracing it through
    would undo what the nesting is for. ``observer`` is told of the canonical program and of each lowering.
    """
    options = options or Options()
    learns = any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs)
    settings = Settings(learns and torch.is_grad_enabled(), options.freeze, options.lowerings)
    if has_nested_graphs(graph_module):
        return _as_it_is(graph_module, settings, "it holds graphs of its own (checkpointing, autograd.Function, cond)")

    def read() -> Program:
        return canonical_form(dynamo_program(graph_module, example_inputs), observer)

    try:
        done = lower_program(read, settings, observer)
    except Exception as e:
        log.warning("gatecc: a graph could not be read", exc_info=e)
        return _as_it_is(graph_module, settings, f"it could not be read: {type(e).__name__}: {e}")
    changed = any(outcome.became for outcome in done.outcomes)
    proofs = {name for outcome in done.outcomes if outcome.became for name in outcome.assumes}
    places = enumerate(done.program.graph.find_nodes(op="placeholder"))
    assumed = tuple(place for place, node in places if node.name in proofs)
    # A fresh module: Dynamo's own tables describe the nodes of its graph and would be held against ours.
    graph = fx.GraphModule(done.program.graph_module, done.program.graph) if changed else graph_module
    return Lowered(graph, tuple(done.outcomes), tuple(done.faults.items()), "", settings.training, assumed)


@dataclass(frozen=True, eq=False)
class LoweredProgram:
    """A program after all lowerings; ``faults``: those that failed and were left out, and why."""

    program: Program
    outcomes: Sequence[Outcome]
    faults: dict[str, str]


def lower_program(
    read: Callable[[], Program], settings: Settings, observer: Observer | None = None, without: Collection[str] = ()
) -> LoweredProgram:
    """Lower a canonical program, all lowerings but those ``without``. ``read`` yields it, anew after each failure: what
    a failed lowering did to it is not taken back."""
    faults: dict[str, str] = {}
    while True:
        program = read()
        left_out = {*faults, *without}
        names = [n for n in _order() if n not in left_out and (settings.only is None or n in settings.only)]
        try:
            with tracing(None):  # its fake mode is that of the compiler behind us, not that of Dynamo's values
                outcomes = _run(program, [LOWERINGS[name]() for name in names], settings, observer)
        except _FailedError as failed:
            faults[failed.lowering] = f"{type(failed.cause).__name__}: {failed.cause}"
            log.warning("gatecc: the lowering %s failed and is left out: %s", failed.lowering, failed.cause)
            continue
        return LoweredProgram(program, outcomes, faults)


def _as_it_is(graph_module: fx.GraphModule, settings: Settings, why: str) -> Lowered:
    log.info("gatecc: a graph goes on to the compiler as it is: %s", why)
    return Lowered(graph_module, untouched=why, training=settings.training)


class _FailedError(Exception):
    """A lowering that raised, or left the graph ill-formed; its edits are lost with the program."""

    def __init__(self, lowering: str, cause: Exception) -> None:
        super().__init__(lowering)
        self.lowering, self.cause = lowering, cause


def _run(
    program: Program, lowerings: Sequence[Lowering], settings: Settings, observer: Observer | None
) -> list[Outcome]:
    outcomes: list[Outcome] = []
    sites = None
    for i, lowering in enumerate(lowerings):
        if sites is None:
            with step("match", program, observer):
                sites = find_sites(program)
        if i == 0:  # as the model wrote it: what an operator computes by now is not told of
            outcomes += [_refused(one, r) for one in lowerings for r in sites.refusals if r.kind == one.refuses]
        before = Before.of(program)
        try:
            with step("lower", program, observer, lowering=lowering.name):
                found = list(lowering.lower(program, sites.sites, settings))
                if any(outcome.became for outcome in found):
                    sites = None  # they have moved
                    program.graph.eliminate_dead_code()
                    made = set(program.graph.nodes) - set(before.arguments)
                    verify(program, before, Suspect(lowering.name, (), made, loses_buffers=True))
        except Exception as e:
            raise _FailedError(lowering.name, e) from e
        outcomes += found
    if settings.only is None:  # else it is asked for that much is not looked at
        outcomes += unspoken(program, outcomes)
    return outcomes


def _refused(lowering: Lowering, refusal: Refusal) -> Outcome:
    reason = f"{refusal.reason} ({refusal.code})"
    return Outcome(lowering.name, refusal.owner, refusal.line, f"what looks like {refusal.kind}", reason=reason)


def _order() -> list[str]:
    """The names of the lowerings, each behind those that it comes after."""
    ordered: list[str] = []

    def add(name: str) -> None:
        for earlier in LOWERINGS[name].after:
            add(earlier)
        if name not in ordered:
            ordered.append(name)

    for name in sorted(LOWERINGS):
        add(name)
    return ordered
