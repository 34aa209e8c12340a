"""Body: what a branch can be: one sub-graph beside a value, or several experts of which the branch adds a weighted
sum."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.gates.option import Option
from gatecc.ir.site import Site, Value
from gatecc.passes.operands import place, stage, static_sizes


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


def operand(site: Site, value: Value, of: str) -> tuple[Value, int, int]:
    """What a body reads (``self``, or a stage of the site), its channels, and those of the value.

    Raises SiteRefusedError unless both have their channels last, at the same positions.
    """
    source = value if of == "self" else stage(site, of)
    sizes = static_sizes(source).get("c"), static_sizes(value).get("c")
    if source.axes == value.axes and value.axes.text.endswith("c") and None not in sizes:
        return source, int(sizes[0] or 0), int(sizes[1] or 0)
    raise SiteRefusedError(
        "an adapter maps channels to channels, which are the last axis of both",
        where=place(site),
        found=f"{of} with the axes {source.axes}, a value with {value.axes}",
        expected="one and the same axes for both, with c last",
        do="read another stage (of=...), adapt stage 'out', or leave this site out",
    )
