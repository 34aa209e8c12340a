"""explain: what the backend makes of a model, as a report. Nothing is compiled."""

from __future__ import annotations

import inspect
import re
import time
import traceback
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import fx, nn

from gatecc.backend.lower import lower
from gatecc.backend.options import Options
from gatecc.capture.compiled import behind
from gatecc.capture.origins import model_line
from gatecc.capture.shield import random_states_kept
from gatecc.capture.signature import copied, split_inputs
from gatecc.engine.analyse import as_it_is, check_runs, parameter_count
from gatecc.errors import UnsupportedModelError
from gatecc.ir.program import Program
from gatecc.pipeline import Stage
from gatecc.pipeline.cost import Cost, cost
from gatecc.report import BreakRow, GraphDump, GraphPair, LoweringRow, PassRow, Report, Totals

Inputs = Any  # a tuple, a dict, or (tuple, dict)


def explain(
    model: nn.Module,
    example_inputs: Inputs,
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
) -> Report:
    """What ``torch.compile(model, backend="gatecc")`` makes of a call: graphs, breaks between them with their source
    lines, the places that were lowered with proof and expected gain, and those that were left alone with the reason.

    The model runs once, uncompiled, in the mode that it is in and with gradients on or off as they are: a graph for
    inference may be lowered further than one for training. It is not changed. ``example_inputs``: a tuple is
    positional, a dict is keyword arguments, ``(tuple, dict)`` is both. ``options`` and ``dynamic`` are those of
    torch.compile.

    Raises ExampleInputsError if the model does not run on the inputs, UnsupportedModelError if it is none, and
    ArgumentError for an unknown option.
    """
    args, kwargs = split_inputs(example_inputs)
    given: Any = behind(model)
    if not isinstance(given, nn.Module):
        raise UnsupportedModelError("not a model", found=type(given).__name__, expected="a torch.nn.Module")
    model = given
    found = _Found(Options.of(options or {}))
    with as_it_is(model), random_states_kept(), _breaks_noted(found.breaks):
        own_args, own_kwargs = copied((args, kwargs))
        try:
            how: dict[str, Any] = {"dynamic": dynamic, **_apart()}
            torch.compile(model, backend=found.backend, **how)(*own_args, **own_kwargs)
        except Exception:
            check_runs(model, args, kwargs)
            raise
    return found.report(model)


@dataclass
class _Found:
    """What the backend is told while the model runs."""

    options: Options
    graphs: list[GraphPair] = field(default_factory=list[GraphPair])
    lowered: list[LoweringRow] = field(default_factory=list[LoweringRow])
    breaks: list[BreakRow] = field(default_factory=list[BreakRow])
    passes: list[PassRow] = field(default_factory=list[PassRow])
    notes: list[str] = field(default_factory=list[str])
    before: Cost = field(default_factory=Cost)
    after: Cost = field(default_factory=Cost)
    training: bool = False

    def backend(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Lower a graph, and run the one that came in."""
        name = f"graph {len(self.graphs) + 1}"
        watched = _Watched()
        clock = time.process_time()
        result = lower(graph_module, example_inputs, self.options, watched)
        spent = (time.process_time() - clock) * 1e3
        self.training |= result.training
        self.lowered += [LoweringRow(**_renamed(asdict(outcome))) for outcome in result.outcomes]
        self.notes += [f"{name}: the lowering {lowering} failed, {why}" for lowering, why in result.faults]
        if result.untouched:
            self.notes.append(f"{name} goes on to Inductor as it is: {result.untouched}")
        if watched.program is None:
            self.graphs.append(GraphPair((name,), GraphDump()))
            return graph_module.forward
        tracing = spent - sum(row.ms for row in watched.passes)
        self.passes += [PassRow(f"trace {name}", tracing), *watched.passes]
        changed = result.graph is not graph_module
        after = (GraphDump.of(watched.program), cost(watched.program)) if changed else (None, watched.cost)
        self.graphs.append(GraphPair((name,), watched.dump, after[0]))
        self.before, self.after = self.before + watched.cost, self.after + after[1]
        return graph_module.forward

    def report(self, model: nn.Module) -> Report:
        """All of it."""
        if not self.graphs:
            why = "a loop holds a break" if self.breaks else "nothing is computed, or it is kept from it"
            self.notes.append(f"torch.compile made no graph of this call: {why}")
        compared = any(pair.after is not None for pair in self.graphs)
        totals = Totals(
            parameters_before=parameter_count(model),
            parameters_after=parameter_count(model) if compared else None,
            flops_before=self.before.flops,
            bytes_before=self.before.bytes,
            flops_after=self.after.flops if compared else None,
            bytes_after=self.after.bytes if compared else None,
        )
        return Report(
            model=type(model).__name__,
            compiled="training" if self.training else "inference",
            lowered=self.lowered,
            breaks=list(dict.fromkeys(self.breaks)),
            passes=self.passes,
            graphs=self.graphs,
            totals=totals,
            notes=self.notes,
        )


@dataclass
class _Watched:
    """An observer that keeps the canonical program as it was before any lowering."""

    program: Program | None = None
    dump: GraphDump = field(default_factory=GraphDump)
    cost: Cost = field(default_factory=Cost)
    passes: list[PassRow] = field(default_factory=list[PassRow])

    def __call__(self, stage: Stage) -> None:
        if stage.name == "canonicalize":  # again after a lowering has failed
            self.program, self.dump, self.cost = stage.program, GraphDump.of(stage.program), cost(stage.program)
            self.passes.clear()
        self.passes.append(
            PassRow(f"{stage.name} {stage.lowering}".rstrip(), stage.seconds * 1e3, stage.nodes, stage.now)
        )


def _renamed(outcome: dict[str, Any]) -> dict[str, str]:
    """The fields of an Outcome as those of its row: every report calls the module ``owner``."""
    texts = {name: text for name, text in outcome.items() if name not in ("assumes", "about")}
    return {"owner" if name == "place" else name: text for name, text in texts.items()}


def _apart() -> dict[str, bool]:
    """What keeps the graphs of an explanation from counting towards the limit of recompilations, where torch can."""
    known = inspect.signature(torch.compile).parameters
    return {"isolate_recompiles": True} if "isolate_recompiles" in known else {}


# --- breaks -----------------------------------------------------------------------------------------------------------

_BRANCH = (
    "a branch depends on the value of a tensor",
    "torch.where to choose between values, torch.cond between computations; or decide by a Python number",
)
_EXPLANATION = re.compile(r"^\s*Explanation: (.*)$", re.MULTILINE)
_HINT = re.compile(r"^\s*Hint: (.*)$", re.MULTILINE)
_NO_HINT = (
    "Please report an issue",
    "This graph break is fundamental",
    "It may be possible to write Dynamo tracing",
    "This graph break may have been caused",
)


_SKIPPED = re.compile(r"^Failed to handle graph break gracefully\..*?:\s*", re.DOTALL)
_WHOLE = ", in a loop: the whole function runs uncompiled"


@contextmanager
def _breaks_noted(rows: list[BreakRow]) -> Generator[None]:
    """Add a row for each break that Dynamo notes inside: also those after which no graph came, and those in loops,
    which it logs alone."""
    from torch._dynamo.symbolic_convert import InstructionTranslatorBase
    from torch._dynamo.utils import graph_break_reasons as noted

    start, log_graph_break, skipped = len(noted), InstructionTranslatorBase.log_graph_break, list[BreakRow]()

    def log_and_note(self: Any, code_options: Any, reason: str, exc: Any) -> None:
        log_graph_break(self, code_options, reason, exc)
        if found := _SKIPPED.match(reason):
            skipped.append(_row(reason[found.end() :], getattr(exc, "real_stack", None) or (), _WHOLE))

    InstructionTranslatorBase.log_graph_break = log_and_note
    try:
        yield
    finally:
        InstructionTranslatorBase.log_graph_break = log_graph_break
        rows += [_row(noted[i].reason, noted[i].user_stack) for i in range(start, len(noted))] + skipped


def _row(text: str, stack: Sequence[traceback.FrameSummary], and_so: str = "") -> BreakRow:
    line = model_line("".join(f'File "{frame.filename}", line {frame.lineno}\n' for frame in stack))
    if text.startswith("generic_jump"):
        return BreakRow(line, *_BRANCH)
    explanation = _EXPLANATION.search(text)
    title = text.strip().splitlines()[0] if text.strip() else ""
    hints = [hint for hint in _HINT.findall(text) if not hint.startswith(_NO_HINT)]
    reason = f"{title}: {explanation[1]}" if explanation else title
    return BreakRow(line, reason.rstrip(".") + and_so if and_so else reason, " ".join(hints))
