"""Carry: what a loop hands from one step to the next, and how it enters there."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gates.option import Option
from gatecc.ir.ops import VIEWS, mutates, opname
from gatecc.ir.program import fake, origin
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Activation, Site, Value
from gatecc.passes.loop.neuron import Neuron
from gatecc.passes.operands import place, stage

State = dict[fx.Node, fx.Node]  # what the first step reads -> what it leaves for the second
Moved = Mapping[fx.Node, fx.Node]  # values of sites -> what an edit of this very loop has put in their place


@dataclass(frozen=True)
class Carry(Option, slot="carry"):
    """Base of what a loop carries."""

    kinds = ("model", "block", "mlp", "step")  # of sites

    @property
    def changes(self) -> bool:
        """Whether one step alone is another function than the site."""
        return False

    def start(self, site: Site, out: fx.Node, edit: Editor, moved: Moved) -> tuple[State, fx.Node]:
        """Edit the first step; its states, each as the node that the step reads and the one that it leaves, and its
        result. Raises SiteRefusedError.

        ``out``: the result as it is now; ``moved``: values of sites that are others by now.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class Nothing(Carry, tag="nothing"):
    """Nothing: all steps are alike, and so is their mean. With numbers per step (``scaled``) they differ by these."""

    def start(self, site: Site, out: fx.Node, edit: Editor, moved: Moved) -> tuple[State, fx.Node]:
        return {}, out


@dataclass(frozen=True)
class Output(Carry, tag="output"):
    """What leaves the site enters it in the next step: a block that is applied again to its own output."""

    kinds = ("block", "mlp")

    def start(self, site: Site, out: fx.Node, edit: Editor, moved: Moved) -> tuple[State, fx.Node]:
        given = stage(site, "in").node
        one, other = fake(given), fake(out)
        if one is None or other is None or one.shape != other.shape or one.dtype != other.dtype:
            raise SiteRefusedError(
                "what leaves the site cannot enter it again",
                where=place(site),
                found=f"{one} in and {other} out",
                expected="one shape and dtype on both sides",
                do='another carry, or a site that maps the stream to itself: "block[...]"',
            )
        return {given: out}, out


@dataclass(frozen=True)
class States(Carry, tag="states"):
    """Outputs of the model that are inputs of its next step.

    ``pairs`` names an input and the output that takes its place in turn: ("mem1", "out1", "mem2", "out2").
    """

    pairs: tuple[str, ...]
    kinds = ("model",)

    def check(self) -> None:
        self.require(
            len(self.pairs) % 2 == 0 and len(self.pairs) > 0, "pairs", "an input and an output in turn, by their names"
        )

    def start(self, site: Site, out: fx.Node, edit: Editor, moved: Moved) -> tuple[State, fx.Node]:
        found: State = {}
        for given, left in zip(self.pairs[::2], self.pairs[1::2], strict=True):
            one, other = stage(site, given).node, stage(site, left).node
            other = moved.get(other, other)
            if one.op != "placeholder" or other.op == "placeholder":
                raise SiteRefusedError(
                    "a state is an input of the model that one of its outputs replaces",
                    where=place(site),
                    found=f"{given} and {left}",
                    expected="the name of an input, then that of an output",
                )
            a, b = fake(one), fake(other)
            if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
                raise SiteRefusedError(
                    "a state changes its shape or dtype from step to step",
                    where=place(site),
                    found=f"{given} {a}, {left} {b}",
                    expected="an output of the shape and dtype of the input",
                )
            found[one] = other
        return found, out


def starting(x: Tensor, threshold: Tensor, start: float) -> Tensor:
    """A membrane before the first step, of x's shape."""
    return torch.zeros_like(x) + start * threshold.to(x.dtype)


@dataclass(frozen=True)
class Spikes(Carry, tag="spikes"):
    """A neuron in the place of each activation; what is carried are their membranes.

    ``neurons`` selects the activations. ``threshold`` and ``amplitude`` (what a spike is worth) are numbers per neuron
    that stay buffers; ``start_at`` is where a membrane begins, as a share of the threshold (1/2 where an ANN is
    converted); ``decay`` 1 is integrate and fire, less is leaky; ``alpha`` is the slope of the surrogate gradient.
    ``replaces`` are the activations that a rate of spikes may stand for: a rate is never negative, so others than a
    ReLU have to be named. ``of_rewrites`` names earlier rewrites, such as "mix": activations that these have inserted,
    of the kinds in ``replaces``, become neurons, too.
    """

    neurons: str = "activation[...]"
    threshold: float = 1.0
    amplitude: float = 1.0
    start_at: float = 0.5
    decay: float = 1.0
    reset: Literal["subtract", "zero"] = "subtract"
    alpha: float = 2.0
    replaces: tuple[str, ...] = ("relu",)
    of_rewrites: tuple[str, ...] = ()

    def check(self) -> None:
        self.require(self.threshold > 0, "threshold", "a number > 0: a membrane never falls below it otherwise")
        self.require(0 < self.decay <= 1, "decay", "a number in (0, 1]")
        self.require(self.alpha > 0, "alpha", "a number > 0")
        Selector.parse(self.neurons)

    @property
    def changes(self) -> bool:
        return True

    def start(self, site: Site, out: fx.Node, edit: Editor, moved: Moved) -> tuple[State, fx.Node]:
        inside = needed(out)
        chosen = [s for s in select(Selector.parse(self.neurons), edit.sites) if s.values["out"].node in inside]
        chosen += self._inserted(edit, inside)
        if not chosen:
            raise SiteRefusedError(
                "no activation becomes a neuron",
                where=place(site),
                found=f"{self.neurons} selects none that the site computes",
                do="select others: neurons=..., or loop over the whole model",
            )
        found: State = {}
        for neuron in chosen:
            self._check(neuron)
            x, y = neuron.values["in"].node, neuron.values["out"].node
            x = moved.get(x, x)
            path = edit.module(inside_of(site, neuron, "neuron"), self._build)
            before = edit.call(starting, x, edit.parameter(f"{path}.threshold"), self.start_at, name="membrane")
            fired, after = edit.call(path, x, before, name="spikes")
            edit.replace(y, fired)
            out = fired if y is out else out
            _remove(y, x, neuron, edit)
            found[before] = after
        return found, out

    def _inserted(self, edit: Editor, inside: set[fx.Node]) -> list[Site]:
        """The activations of earlier rewrites, in order."""
        return [
            Activation(
                owner=origin(node).owner,
                line=origin(node).line,
                values={"in": Value(node.all_input_nodes[0], ""), "out": Value(node, "")},
                function=opname(node),
            )
            for node in edit.program.calls()
            if node in inside and opname(node) in self.replaces and origin(node).inserted_by in self.of_rewrites
        ]

    def _check(self, neuron: Site) -> None:
        if not isinstance(neuron, Activation):
            raise SiteRefusedError(
                "a neuron stands in the place of an activation",
                where=place(neuron),
                found=f"a site of kind {neuron.kind}",
                do='neurons="activation[...]"',
            )
        if neuron.function not in self.replaces:
            raise SiteRefusedError(
                "the rate of a neuron is no such activation",
                where=place(neuron),
                found=neuron.function,
                expected=", ".join(self.replaces),
                do='name it in replaces=(...) if the model is trained afterwards, or leave it out: neurons="..."',
            )

    def _build(self) -> nn.Module:
        return Neuron(self.threshold, self.amplitude, self.decay, self.reset, self.alpha)


def _remove(y: fx.Node, x: fx.Node, neuron: Site, edit: Editor) -> None:
    """Take an activation out that nobody reads any more; one that writes into its operand, too."""
    if not mutates(y):
        edit.discard(y, inside=True)
        return
    later = [user for user in x.users if user > y and user not in edit.inserted]
    if later or opname(x) in VIEWS or x.op != "call_function":
        raise SiteRefusedError(
            "an activation writes into a tensor that others read",
            where=place(neuron),
            found=f"{y.name} writes into {x.name}, which is {'read later' if later else 'part of another'}",
            do="write it without inplace=True",
        )
    edit.program.graph.erase_node(y)
    edit.erased.add(y)


def inside_of(site: Site, part: Site, name: str) -> str:
    """A name for what belongs to a part of a site: ``neuron_layer1_act``."""
    path = part.owner.removeprefix(site.owner).strip(".")
    return "_".join([name, *filter(None, path.split("."))])


def needed(out: fx.Node) -> set[fx.Node]:
    """A value and all that it is computed from."""
    found, todo = {out}, [out]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(new)
        todo += new
    return found
