"""A golden case: a title, a graph, a pipeline, what changes in the graph, the weights that change, and the contract.

The text before, or the graph of ``graphs/`` that it names, is read, the pipeline runs, and everything behind it is
computed and compared: a case is a test and an example at once. The graph that comes out is printed as a difference from
the canonical graph that went in (from the text itself, where the pipeline is canonicalize alone). ``python -m
tests.golden`` writes the computed parts of all cases anew; read the difference.
"""

from __future__ import annotations

import textwrap
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from torch import fx

from gatecc.ir.printer import graph_text
from gatecc.ir.program import origin
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.branch.branch import Branch
from gatecc.passes.bypass import Bypass
from gatecc.passes.exchange import Exchange
from gatecc.passes.fuse import Fuse
from gatecc.passes.fuse_experts import FuseExperts
from gatecc.passes.gate import Gate
from gatecc.passes.gate_channels import GateChannels
from gatecc.passes.loop import Loop
from gatecc.passes.mix.mix import Mix
from gatecc.passes.reweight.reweight import Reweight
from gatecc.passes.route.route import Route
from gatecc.passes.task_mask import TaskMask
from gatecc.pipeline import apply, prepare
from gatecc.scope.family import difference
from gatecc.scope.variant import Variant
from tests.golden.change import change
from tests.golden.reader import Reader

FOLDER = Path(__file__).parent
GRAPHS = FOLDER / "graphs"
LIMIT = 40  # every case has fewer lines: nobody reads longer ones
_SHOWN = (
    AttentionEdit,
    Gate,
    Branch,
    Fuse,
    Exchange,
    Bypass,
    Mix,
    Route,
    FuseExperts,
    GateChannels,
    Loop,
    Reweight,
    TaskMask,
)
PASSES: dict[str, type[Rewrite]] = {cls.name: cls for cls in _SHOWN}
HEADINGS = ("pipeline", "before", "change", "weights", "contract")


@dataclass
class Case:
    """``intro`` is the title and, after a blank line, what the case shows."""

    intro: str
    pipeline: list[str]
    before: str
    change: str = ""
    weights: str = ""
    contract: str = ""

    @classmethod
    def read(cls, text: str) -> Case:
        """Parse the text of a case."""
        parts: dict[str, list[str]] = {"intro": []}
        at = "intro"
        for line in text.splitlines():
            if line in HEADINGS:
                parts[at := line] = []
                continue
            parts[at].append(line)
        found = {name: textwrap.dedent("\n".join(rows)).strip("\n") for name, rows in parts.items()}
        return cls(pipeline=found.pop("pipeline").splitlines(), **found)

    def __str__(self) -> str:
        rows = [self.intro]
        bodies = ("\n".join(self.pipeline), self.before, self.change, self.weights, self.contract)
        for name, body in zip(HEADINGS, bodies, strict=True):
            rows += ["", name, textwrap.indent(body, "    ")] if body else []
        return "\n".join(rows) + "\n"

    @property
    def graph(self) -> str:
        """The text of the graph that goes in."""
        return self.before if "\n" in self.before else (GRAPHS / f"{self.before}.txt").read_text()

    def run(self) -> Case:
        """The case with its computed parts as they come out now."""
        reader = Reader(self.graph)
        program = reader.program
        written = graph_text(program, sizes=reader.sizes) if "\n" in self.before else self.before
        before = _copy(program.graph)
        expected = Variant(program, ())(program.module, program.example)
        rewrites = [rewrite_from_text(line) for line in self.pipeline if line != "canonicalize"]
        prepared = prepare(program, canonical="canonicalize" not in self.pipeline)
        if rewrites:
            before = _copy(program.graph)
        editors = apply(prepared, rewrites)
        steps = [step for of_one in editors for edit in of_one for step in edit.weights]
        contracts = ["exact", *(str(rewrite.contract()) for rewrite in rewrites)]
        old, new = (graph_text(graph, sizes=reader.sizes) for graph in (before, program.graph))
        for step in steps:
            step.apply(program.module)
        got = Variant(program, ())(program.module, program.example)
        weights = "\n".join(step.describe(program.module) for step in steps)
        case = Case(self.intro, self.pipeline, written, "", weights, _contract(contracts, expected, got))
        inserted = {node.name for node in program.calls() if origin(node).inserted_by}
        for width in (0, 70, 110):
            case.change = change(old, new, inserted, width)
            if str(case).count("\n") < LIMIT:
                break
        return case


def _copy(graph: fx.Graph) -> fx.Graph:
    """A graph to print later, when a rewrite may have made some of its sizes constants."""
    made = fx.Graph()
    made.output(made.graph_copy(graph, {}))
    return made


def rewrite_from_text(line: str) -> Rewrite:
    """``gate(site="mlp[...].out", gate="self, linear, token, sigmoid")``"""
    name = line.partition("(")[0]
    cls = PASSES[name]
    options: dict[str, Any] = eval(line, {"__builtins__": {}, name: dict})
    hints = get_type_hints(cls)
    known = {f.name for f in fields(cls)}
    return cls(**{key: _option(hints[key], value) for key, value in options.items() if key in known})


def _option(hint: Any, value: Any) -> Any:
    if hint is Selector:
        return Selector.parse(value)
    hint = next((h for h in get_args(hint) if hasattr(h, "coerce")), hint)  # GateSpec of GateSpec | None
    return hint.coerce(value) if hasattr(hint, "coerce") else value


def _contract(contracts: list[str], expected: tuple[Any, ...], got: tuple[Any, ...]) -> str:
    declared = contracts[-1]
    error = max(difference(a, b) for a, b in zip(expected, got, strict=True))
    tolerance = {"exact": 1e-6}.get(declared) or float(
        declared.rpartition("(")[2].rstrip(")") if "(" in declared else "inf"
    )
    if declared == "changes_function":
        return "changes_function" if error > 1e-3 else "changes_function: and it does not"
    return f"{declared}: {'held' if error <= tolerance else f'broken, {error:.2g}'}{', bitwise' if error == 0 else ''}"


def cases() -> list[Path]:
    """The files of all cases."""
    return sorted(path for path in FOLDER.glob("*/*.txt") if path.parent != GRAPHS)


def rerun(path: Path) -> tuple[str, str]:
    """A case as it stands, and as it comes out."""
    text = path.read_text()
    torch.manual_seed(0)
    return text, str(Case.read(text).run())
