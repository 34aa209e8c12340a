"""Body: what a branch can be: one sub-graph beside a value, or several experts of which the branch adds a weighted
sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.option import Option
from gatecc.ir.gates.source import At, Cond, Source, Stage
from gatecc.ir.program import shape
from gatecc.ir.site import Site, Value
from gatecc.passes.operands import place, source, stage, static_sizes


@dataclass(frozen=True)
class Body(Option, slot="body"):
    """Base of the sub-graphs that a branch can be."""

    @property
    def reads(self) -> tuple[str, ...]:
        """Stages of the site beside the value."""
        return ()

    @property
    def effects(self) -> Effects:
        """What a branch with this body gives up, needs and promises."""
        return Effects()

    @property
    def starts_at_zero(self) -> bool:
        """Whether the sub-graph yields exactly 0 when it is fresh."""
        return False

    @property
    def ops(self) -> tuple[str, ...]:
        """How its result may meet the value: ``add``, ``lerp`` or ``cat``, see `Branch`."""
        return ("add", "lerp", "cat")

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        """Insert the sub-graph; its result broadcasts against ``value``."""
        raise NotImplementedError

    def notes(self, site: Site, value: Value) -> Iterable[str]:
        """What a report should say of it, see `Rewrite.notes`."""
        return ()


@dataclass(frozen=True)
class Bank(Body):
    """Base of bodies that are several sub-graphs of one shape, the experts, of which a gate or a router weighs each.

    With a gate all of them run. With a router a position runs those that were chosen for it, and no others.
    """

    experts: int

    @property
    def scores(self) -> int:
        """How many numbers a gate gives for them: one for each expert, and more where parts are weighed apart."""
        return self.experts

    def check(self) -> None:
        self.require(self.experts > 0, "experts", "a positive integer")

    @property
    def ops(self) -> tuple[str, ...]:
        return ("add",)

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        raise TypeError("experts are weighed: call mix")

    def mix(self, site: Site, value: Value, edit: Editor, weights: fx.Node, indices: fx.Node | None = None) -> fx.Node:
        """Insert the weighted sum of the experts, in the shape of ``value``.

        weights: (*positions, E) for all experts, or with indices (T, k) the k chosen ones of each of T positions.
        """
        raise NotImplementedError


class Adapting:
    """What adapters share: they read one value, ``of``, start at 0, and take nothing of their layer but the graph."""

    of: str

    @property
    def reads(self) -> tuple[str, ...]:
        return () if self.of == "self" else (self.of,)

    @property
    def effects(self) -> Effects:
        return Effects(same_for_layers=True)

    @property
    def starts_at_zero(self) -> bool:
        return True


def elsewhere(of: str) -> bool:
    """Whether a text names a value that is none of the site's: ``at(SELECTOR)``, ``cond(INPUT)``."""
    return not isinstance(Source.parse(of), Stage)


def other(of: str, value: Value, edit: Editor) -> Value:
    """What a text names for a body: ``self`` is the value that it stands beside, another word a stage of the site.

    ``cond(INPUT)`` is an input of the model, ``at(SELECTOR)`` a value of another site: one for all sites that the
    rewrite selects, or the k-th for the k-th. Raises SiteRefusedError.
    """
    found = Source.parse(of)
    if len(found.refs) != 1 or not isinstance(found, (Stage, At, Cond)) or edit.selected is None:
        raise ArgumentError("a body reads one value", found=of, expected="a stage, at(SELECTOR) or cond(INPUT)")
    if of == "self":
        return value
    read = source(found.refs[0], edit.selected, edit)
    if isinstance(found, Cond) and "c" in read.axes:  # of an input that the model does not read any size may change
        int(shape(read.node)[read.axes.index("c")])  # this graph is for the one that it has
    return read


def operand(site: Site, value: Value, of: str) -> tuple[Value, int, int]:
    """What a body reads (``self``, or a stage of the site), its channels, and those of the value.

    Raises SiteRefusedError unless both have their channels last, at the same positions.
    """
    read = value if of == "self" else stage(site, of)
    sizes = static_sizes(read).get("c"), static_sizes(value).get("c")
    if read.axes == value.axes and value.axes.text.endswith("c") and None not in sizes:
        return read, int(sizes[0] or 0), int(sizes[1] or 0)
    raise SiteRefusedError(
        "an adapter maps channels to channels, which are the last axis of both",
        where=place(site),
        found=f"{of} with the axes {read.axes}, a value with {value.axes}",
        expected="one and the same axes for both, with c last",
        do="read another stage (of=...), adapt stage 'out', or leave this site out",
    )
