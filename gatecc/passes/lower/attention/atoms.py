"""Atoms: the axes of attention taken apart as far as any spelling of it takes them apart, and put together again.

Scores may have batch and heads as two axes, as one (bmm), with windows between them (Swin), or groups of heads
(einsum). An axis is a `Group` of atoms; views of the scores cut atoms in two, so that tensors of different views can
meet.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx

from gatecc.ir.match.axes import permutation
from gatecc.ir.ops import CASTS, RESHAPES, SAME_SHAPE, TRANSPOSES, argument, opname
from gatecc.ir.sizes import expression, node_shape, numel

_KEPT = CASTS | SAME_SHAPE


@dataclass(frozen=True, eq=False)
class Atom:
    """An axis that no view cuts. ``size`` is an expression in the sizes of the inputs."""

    size: Any

    @property
    def fixed(self) -> bool:
        """Whether the size is the same in every call."""
        return bool(self.size.is_Integer)


Group = tuple[Atom, ...]  # of one axis, outermost first; an axis of size 1 has none
Layout = tuple[Group, ...]


@dataclass(eq=False)
class Cuts:
    """What was cut so far: layouts of before are read with `now`."""

    parts: dict[Atom, tuple[Atom, Atom]] = field(default_factory=dict[Atom, tuple[Atom, Atom]])

    def now(self, group: Group) -> Group:
        """The group in atoms that are not cut."""
        return tuple(
            piece for atom in group for piece in (self.now(self.parts[atom]) if atom in self.parts else (atom,))
        )

    def layout(self, layout: Layout) -> Layout:
        return tuple(map(self.now, layout))

    def cut(self, atom: Atom, outer: Any) -> Atom | None:
        """Cut off the outer part of an atom; None if the sizes do not divide."""
        inner = sympy.cancel(atom.size / outer)
        if sympy.denom(inner) != 1:
            return None
        self.parts[atom] = (Atom(sympy.sympify(outer)), Atom(inner))
        return self.parts[atom][0]


def whole(size: Any) -> Group:
    """A new axis."""
    found = expression(size)
    return () if found == 1 else (Atom(found),)


def after(node: fx.Node, source: fx.Node, layout: Layout, cuts: Cuts) -> Layout | None:
    """The layout of a node that moves the axes of its source, or works elementwise; None if it does something else."""
    name, shape, before = opname(node), node_shape(node), node_shape(source)
    if shape is None or before is None:
        return None
    if name in TRANSPOSES:
        order = permutation(node, len(layout))
        return None if order is None else tuple(layout[i] for i in order)
    if name in RESHAPES:
        return _reshaped([atom for group in cuts.layout(layout) for atom in group], shape, cuts)
    if name == "unsqueeze":
        at = int(argument(node, 1, "dim")) % len(shape)
        return (*layout[:at], (), *layout[at:])
    if name == "squeeze":
        kept = [group for group in layout if group]
        return tuple(kept) if len(kept) == len(shape) else None
    same = len(shape) == len(before) and all(expression(a) == expression(b) for a, b in zip(shape, before, strict=True))
    return layout if same else None


def _reshaped(atoms: list[Atom], shape: Sequence[Any], cuts: Cuts) -> Layout | None:
    groups: list[Group] = []
    for size in shape:
        wanted, group = expression(size), list[Atom]()
        while sympy.simplify(wanted - _product(group)) != 0:
            if not atoms:
                return None
            atom = atoms.pop(0)
            if _exceeds(_product([*group, atom]), wanted):
                outer = cuts.cut(atom, sympy.cancel(wanted / _product(group)))
                if outer is None:
                    return None
                atoms.insert(0, cuts.parts[atom][1])
                atom = outer
            group.append(atom)
        groups.append(tuple(group))
    return None if atoms else tuple(groups)


def _product(atoms: Sequence[Atom]) -> Any:
    return numel([atom.size for atom in atoms])


def _exceeds(found: Any, wanted: Any) -> bool:
    """Whether an axis is only a part of the atoms. Sizes are at least 2, so that a true multiple is larger."""
    ratio = sympy.cancel(found / wanted)
    return ratio != 1 and sympy.denom(ratio) == 1


# --- tensors ----------------------------------------------------------------------------------------------------------

Sizes = Callable[[Atom], Any]


def rearrange(x: torch.Tensor, have: Layout, want: Layout, sizes: Sizes) -> torch.Tensor:
    """A tensor of the layout ``have`` in the layout ``want``. What it lacks is repeated without a copy where an axis
    lacks other parts as well, and left at size 1 where it lacks the whole axis.

    Views as far as the strides allow. ``sizes`` are asked for as little as possible. ``have`` may have further axes in
    front, which are broadcast.
    """
    have = have[len(have) - x.ndim :]
    if single := tuple(at for at, group in enumerate(have) if not group):
        x = x.squeeze(single)
    pieces: list[Group] = []
    for group in filter(None, have):
        runs = _runs(group, want)
        if len(runs) > 1:
            x = x.unflatten(len(pieces), _numbers(runs, sizes))
        pieces += runs
    wanted = [sorted((p for p in pieces if p[0] in group), key=lambda p: group.index(p[0])) for group in want]
    order = [pieces.index(piece) for group in wanted for piece in group]
    x = x if order == sorted(order) else x.permute(order)
    for at, (group, held) in enumerate(zip(want, wanted, strict=True)):
        x = _filled(x, at, group, held, sizes)
    return x


def _runs(group: Group, want: Layout) -> list[Group]:
    """Cut an axis where its parts do not stay together."""
    runs: list[list[Atom]] = [[group[0]]]
    for one, other in pairwise(group):
        together = any(one in g and g.index(one) + 1 < len(g) and g[g.index(one) + 1] is other for g in want)
        if together:
            runs[-1].append(other)
        else:
            runs.append([other])
    return [tuple(run) for run in runs]


def _numbers(runs: Sequence[Group], sizes: Sizes) -> list[Any]:
    """The sizes of parts; one that changes from call to call is left open."""
    free = [run for run in runs if not all(atom.fixed for atom in run)]
    return [-1 if free and run is free[0] else _size(run, sizes) for run in runs]


def _size(group: Group, sizes: Sizes) -> Any:
    total: Any = 1
    for atom in group:
        total = total * (int(atom.size) if atom.fixed else sizes(atom))
    return total


def _filled(x: torch.Tensor, at: int, group: Group, held: Sequence[Group], sizes: Sizes) -> torch.Tensor:
    """Make one axis of the pieces from axis ``at`` on."""
    if not held:
        return x.unsqueeze(at)
    place, pieces, rest = at, list(held), list(group)
    while rest:
        if pieces and pieces[0][0] is rest[0]:
            rest = rest[len(pieces.pop(0)) :]
        else:
            x = x.unsqueeze(place)
            x = x.expand(*x.shape[:place], _size((rest.pop(0),), sizes), *x.shape[place + 1 :])
        place += 1
    return x if place == at + 1 else x.flatten(at, place - 1)


__all__ = ["Atom", "Cuts", "Group", "Layout", "after", "rearrange", "whole"]
