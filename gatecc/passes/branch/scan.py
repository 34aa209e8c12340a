"""Scan: the same mixer once more, over the tokens in another order."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import shape
from gatecc.ir.site import Residual, Site, Value
from gatecc.passes.again import again
from gatecc.passes.branch.body import Body
from gatecc.passes.operands import place, stage

_PRIME = 2147483647


@dataclass(frozen=True)
class Scan(Body, tag="scan"):
    """P^-1 f(P x), f being what computes the value from the site's input x, and P another order of the tokens.

    ``flip`` is from the last token to the first, ``shuffle`` an order that looks random: a hash of the places and of
    ``seed``, the same in every call with as many tokens. f keeps its weights; it runs once more, on all tokens. Every
    token then depends on later ones, whatever f does.
    """

    order: Literal["flip", "shuffle"]
    seed: int = 0

    def check(self) -> None:
        self.require(0 <= self.seed < _PRIME, "seed", f"a number from 0 to {_PRIME - 1}")

    @property
    def effects(self) -> Effects:
        return Effects(loses_cache=True, same_for_layers=True)

    @property
    def ops(self) -> tuple[str, ...]:
        return ("add", "lerp")

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        given = stage(site, _input(site))
        tokens = [axis for axis in given.axes if axis in "nmtyx"]
        if given.axes != value.axes or len(tokens) != 1 or shape(given.node) != shape(value.node):
            raise SiteRefusedError(
                "only tokens in one row can be scanned in another order, by what keeps their shape",
                where=place(site),
                found=f"axes {given.axes} to {value.axes}",
                expected="bnc to bnc",
                do="select the branch of a residual, or an attention, MLP or block",
            )
        axis = given.axes.index(tokens[0])
        there, back = (_flipped, _flipped) if self.order == "flip" else (_shuffled, _unshuffled)
        put = edit.call(there, given.node, axis, self.seed, name="reordered")
        result = again(edit, {given.node: put}, value.node)
        if result is value.node:
            raise SiteRefusedError("the value does not depend on the input of the site", where=place(site))
        return edit.call(back, result, axis, self.seed, name="scanned")

    def notes(self, site: Site, value: Value) -> Iterable[str]:
        yield f"{site.key}: {self.order} scans run the mixer again; every token depends on later ones"

    @property
    def reads(self) -> tuple[str, ...]:
        return ()


def _input(site: Site) -> str:
    if isinstance(site, Residual):
        return "skip"
    return "hidden" if "hidden" in site.values else "in"


def order_of(count: int, seed: int, like: Tensor) -> Tensor:
    """The order of so many places: sorted by a hash of whole numbers, which every runtime computes alike."""
    at = torch.arange(count, device=like.device) + 1
    mixed = (at * 48271 + seed) % _PRIME
    mixed = (mixed * mixed + at) % _PRIME
    return torch.argsort(mixed, stable=True)


def _flipped(x: Tensor, axis: int, seed: int) -> Tensor:
    """The tokens from the last to the first."""
    return x.flip(axis)


def _shuffled(x: Tensor, axis: int, seed: int) -> Tensor:
    """The tokens in another order."""
    return x.index_select(axis, order_of(x.size(axis), seed, x))


def _unshuffled(x: Tensor, axis: int, seed: int) -> Tensor:
    """The tokens in their own order again."""
    return x.index_select(axis, torch.argsort(order_of(x.size(axis), seed, x)))
