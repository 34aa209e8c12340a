"""Boundary: one side of a call of a submodule that hooks look at: the values that go in, or those that come out.

A graph knows no modules, so hooks on them would be skipped. While such a call is captured, each tensor that crosses the
border of a hooked submodule passes a marker, an operator that does nothing. gatecc.ir.settle takes the markers out
again, lest they stand between the operators of a site, and remembers where they were and who read through them. The
values are followed through every edit (`follow`), and a variant is printed with calls of the hooks at these places.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import has_side_effect
from torch.utils._pytree import TreeSpec

_library = torch.library.Library("gatecc", "FRAGMENT")
_library.define("boundary(Tensor(a) x, int side, int slot) -> Tensor(a)")
_library.impl("boundary", lambda x, side, slot: torch.ops.aten.alias.default(x), "CompositeExplicitAutograd")
MARKER = torch.ops.gatecc.boundary.default
has_side_effect(MARKER)  # dead code elimination keeps it: what only a hook reads is needed all the same


class _Marked(torch.autograd.Function):
    """Tells the code that is captured that a marked tensor needs gradients, if the tensor did."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, side: int, slot: int) -> torch.Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return MARKER(x, side, slot)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0], None, None


_library.impl("boundary", lambda x, side, slot: _Marked.apply(x, side, slot), "Autograd")


class Slot(NamedTuple):
    """The place of a tensor among the leaves of a boundary; other leaves are constants."""

    number: int


@dataclass(eq=False)
class Boundary:
    """``leaves`` in the structure ``spec`` are (args, kwargs) of a call of ``path``, or its output if ``leaving``.

    ``values`` are the nodes of the slots, as they are after the edits so far, ``readers`` who reads each of them on the
    far side of the boundary: nodes, and other boundaries. ``place`` is the number of nodes of the captured graph that
    come before; None for a module that an edit calls.
    """

    path: str
    leaving: bool
    spec: TreeSpec
    leaves: tuple[Any, ...]
    entry: Boundary | None = None  # of a leaving boundary: the other side
    values: list[fx.Node] = field(default_factory=list[fx.Node])
    readers: list[set[fx.Node | Boundary]] = field(default_factory=list["set[fx.Node | Boundary]"])
    place: int | None = None

    @property
    def slots(self) -> int:
        """How many tensors cross it."""
        return 1 + max((leaf.number for leaf in self.leaves if isinstance(leaf, Slot)), default=-1)


def within(path: str, outer: str) -> bool:
    """Whether a module is another one, or lies in it."""
    return not outer or path == outer or path.startswith(outer + ".")


def follow(
    boundaries: Collection[Boundary], old: fx.Node, new: fx.Node, owner: str | None, readers: Collection[fx.Node] | None
) -> None:
    """An edit in the name of the module ``owner`` replaced ``old`` for all readers, or for some; None: in any name.

    What goes into a module was edited if the edit belongs outside of it, what comes out if the edit belongs inside.
    """
    for boundary in boundaries:
        if owner is None or _follows(boundary, owner, readers is None):
            boundary.values = [new if value is old else value for value in boundary.values]


def _follows(boundary: Boundary, owner: str, everyone: bool) -> bool:
    inside = within(owner, boundary.path)
    if boundary.leaving:
        return inside and everyone
    return not inside and (everyone or within(boundary.path, owner))


def copies(boundaries: Collection[Boundary], nodes: Mapping[fx.Node, fx.Node]) -> list[Boundary]:
    """The boundaries of a program as those of its copy."""
    made = {b: Boundary(b.path, b.leaving, b.spec, b.leaves, place=b.place) for b in boundaries}
    for old, new in made.items():
        new.entry = None if old.entry is None else made[old.entry]
        new.values = [nodes[value] for value in old.values]
        for readers in old.readers:
            new.readers.append({made[r] if isinstance(r, Boundary) else nodes[r] for r in readers})
    return list(made.values())


def held(boundaries: Collection[Boundary]) -> set[fx.Node]:
    """The nodes that hooks are to see: they stay, whether or not anything else reads them."""
    return {value for boundary in boundaries for value in boundary.values}
