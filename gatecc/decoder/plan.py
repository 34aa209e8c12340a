"""Plan: everything about a captured model that its step programs are written from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx
from torch.utils._pytree import tree_structure

from gatecc.decoder.analysis.axes import NOW, Lengths
from gatecc.decoder.analysis.dependence import Dependence, DependsOn
from gatecc.decoder.analysis.inputs import Inputs, read_inputs
from gatecc.decoder.analysis.labels import Labels
from gatecc.decoder.analysis.transfer import label
from gatecc.decoder.refuse import refusal
from gatecc.decoder.rules.attention import Recalled, attention
from gatecc.decoder.rules.deferred_softmax import deferred_softmaxes
from gatecc.decoder.rules.scan import scans
from gatecc.decoder.rules.slots import Slot
from gatecc.errors import DecoderError
from gatecc.ir.dataflow import Flow
from gatecc.ir.evaluate import Evaluator
from gatecc.ir.program import Program
from gatecc.ir.site import Attention
from gatecc.ir.sizes import described_shape, expression, node_shape, symbols
from gatecc.pipeline import prepare


@dataclass(eq=False)
class Plan:
    """``nodes`` in graph order; ``windows``: the widths of sliding windows, one start each in the state."""

    program: Program
    inputs: Inputs
    slots: list[Slot]
    flow: Flow
    dependence: Dependence
    labels: Labels
    logits: fx.Node
    output: int  # the index of the logits among the leaves of the model's output
    attentions: dict[fx.Node, Recalled]  # by the node that yields their result
    cross: list[tuple[fx.Node, fx.Node]]  # keys and values of attention to a context

    def __post_init__(self) -> None:
        self.nodes: list[fx.Node] = list(self.program.graph.nodes)
        self.fused = {core: found for core, found in self.attentions.items() if found.fused}
        self.context = self._context()
        self.evaluator = Evaluator(self.flow)
        self.windows: list[int] = sorted({s.span.window for s in self.slots if s.span.window is not None})

    @property
    def lengths(self) -> Lengths:
        """The symbols of length and batch."""
        return self.inputs.lengths

    def _context(self) -> list[fx.Node]:
        """The context nodes that steps read, and an input for each length of a context that they need."""
        found = [
            node
            for node in self.nodes
            if self.depends_on(node) == "context" and any(self._steps(user) for user in node.users)
        ]
        read = {s for n in self.nodes if self._steps(n) for size in node_shape(n) or () for s in symbols(size)}
        for symbol in sorted(read & self.lengths.other, key=str):
            if not any(symbol in map(expression, node_shape(n) or ()) for n in found):
                found += [n for n in self.inputs.context if symbol in map(expression, node_shape(n) or ())][:1]
        return found

    def _steps(self, user: fx.Node) -> bool:
        return user.op == "output" or self.depends_on(user) in ("data", "live")

    def depends_on(self, node: fx.Node) -> DependsOn:
        """What a node depends on."""
        return self.dependence.of(node)

    def tensor(self, node: fx.Node) -> torch.Tensor:
        """The live tensor that a node reads. Raises DecoderError if it is a graph (of a higher-order operator)."""
        found = self.program.tensor(node)
        if found is None:
            raise refusal(next(iter(node.users)), "it runs a graph of its own, which is not looked into")
        return found


def plan(program: Program) -> Plan:
    """Plan the steps of a canonical program, which is changed. Raises DecoderError where a node stands in the way."""
    inputs = read_inputs(program)
    logits, output_at = _only_logits(program, inputs)
    slots: list[Slot] = []
    attentions: dict[fx.Node, Recalled] = {}
    sites = [site for site in prepare(program, canonical=True).found if isinstance(site, Attention)]
    for site in sites:
        recalled = attention(program, site, slots, inputs.lengths)
        if recalled is not None:
            attentions[site.core] = recalled
    deferred_softmaxes(Flow(program), {site.core for site in sites}, slots, inputs.lengths)
    flow = Flow(program)
    before = Dependence(flow, inputs)  # positions that count a mask are computed of the whole mask
    scans(program, {node for node in flow.data if before.of(node) == "data"}, slots, inputs.lengths)
    program.graph.eliminate_dead_code()
    flow = Flow(program)
    dependence = Dependence(flow, inputs)
    labels = label(dependence, slots, program.graph.nodes)
    _check_output(logits, labels)
    known = [site for site in sites if dependence.of(site.core) == "data" and {"k", "v"} <= site.values.keys()]
    pairs = [(site.values["k"].node, site.values["v"].node) for site in known]
    cross = [pair for pair in pairs if all(dependence.of(node) == "context" for node in pair)]
    return Plan(program, inputs, slots, flow, dependence, labels, logits, output_at, attentions, cross)


def _only_logits(program: Program, inputs: Inputs) -> tuple[fx.Node, int]:
    """Let the program return the first output that runs along the tokens, and nothing else."""
    output = program.graph.output_node()
    for at, node in enumerate(program.outputs):
        if isinstance(node, fx.Node) and inputs.lengths.axes(node):
            output.args = ((node,),)
            program.out_spec = tree_structure(node)
            program.graph.eliminate_dead_code()
            return node, at
    raise DecoderError(
        "no output of the model runs along the tokens",
        where=type(program.module).__name__,
        expected="logits of shape (batch, length, vocabulary)",
        do="derive the decoder of the language model rather than of a classifier on it",
    )


def _check_output(logits: fx.Node, labels: Labels) -> None:
    spans = labels.of.get(logits)
    if not isinstance(spans, tuple) or len(spans) < 2 or spans[1] != NOW:
        raise DecoderError(
            "the output does not run along the tokens",
            where=logits.name,
            found=f"{logits.name} of shape ({described_shape(logits)})",
            expected="logits of shape (batch, length, vocabulary)",
        )
