"""TwoPass: adapters that are weighed by what the model computes without them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import SiteRefusedError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.program import shape
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.select import Selector, select
from gatecc.ir.site import Site
from gatecc.passes.again import again
from gatecc.passes.branch.body import Bank
from gatecc.passes.branch.branch import add
from gatecc.passes.operands import beside, place, readers, source_shape, stage


@dataclass(frozen=True)
class TwoPass(Rewrite):
    """Run the model twice: first without adapters, then with a bank of them at each of the sites ``at``.

    A classifier reads the value that is selected (``Head.in_``: the last hidden state) in the first pass, per position,
    and yields a score for each expert of each bank, or with ``per_layer=False`` one for all banks; a softmax with the
    temperature ``T`` over the experts makes weights of them. With ``k`` the k largest are kept, which sum to 1, and the
    other experts do not run. ``depth`` counts the classifier's linear layers, ``size`` is the width between them.

    No gradient goes into the first pass. The forward costs twice what it did, apart from the adapters, and no cache of
    keys and values holds both passes; `gatecc.decoder` keeps the state of each.
    """

    name = "two_pass"

    body: Bank
    at: Selector
    depth: int = 1
    size: int = 2048
    T: float = 1.0
    k: int = 0
    per_layer: bool = True
    label: str = "classifier"

    def contract(self) -> Contract:
        return identity_at_init() if self.body.starts_at_zero else changes_function()

    def effects(self) -> Effects:
        return Effects(whole_model=True, loses_cache=True)

    def notes(self, site: Site) -> Iterable[str]:
        yield f"{site.key}: each call runs the model twice, for the adapters are weighed by a first pass without them"

    def rewrite(self, site: Site, edit: Editor) -> None:
        hidden = stage(site, self.site.stage)
        adapted = select(self.at, edit.sites)
        values = [stage(one, self.at.stage) for one in adapted]
        channels, banks = source_shape(hidden).channels, len(adapted) if self.per_layer else 1
        first = again(edit, {value.node: value.node for value in values}, hidden.node)
        path = edit.module(self.label, lambda: beside(Classifier(self, channels, banks), edit))
        scores = edit.call(path, edit.call(detached, first, name="first_pass"), name=self.label)
        for number, (one, value) in enumerate(zip(adapted, values, strict=True)):
            if len(shape(value.node)) != len(shape(hidden.node)) or value.axes.positions != hidden.axes.positions:
                raise SiteRefusedError(
                    "the adapted value has other positions than the hidden state that weighs it",
                    where=place(one),
                    found=f"axes {value.axes} and {hidden.axes}",
                    expected="the same positions",
                    do="leave this site out (at=...)",
                )
            inside = replace(edit, site=one)
            bank = number if self.per_layer else 0
            weights = edit.call(all_weights if not self.k else chosen, scores, bank, self.T, self.k, name="weights")
            mixed = self.body.mix(one, value, inside, *(weights if isinstance(weights, tuple) else (weights,)))
            inside.replace(value.node, inside.call(add, value.node, mixed), readers(one, self.at.stage))


class Classifier(nn.Module):
    """Scores of E experts in each of L banks. x: (*positions, C) -> (*positions, L, E)."""

    def __init__(self, spec: TwoPass, channels: int, banks: int) -> None:
        super().__init__()
        sizes = [channels, *[spec.size] * (spec.depth - 1), banks * spec.body.experts]
        self.experts = spec.body.experts
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(sizes))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = F.relu(layer(x))
        return self.layers[-1](x).unflatten(-1, (-1, self.experts))


def detached(x: Tensor) -> Tensor:
    """x without its gradient."""
    return x.detach()


def all_weights(scores: Tensor, bank: int, temperature: float, k: int) -> Tensor:
    """scores: (*positions, L, E) -> (*positions, E), a softmax at each position."""
    return torch.softmax(scores.select(-2, bank) / temperature, -1)


def chosen(scores: Tensor, bank: int, temperature: float, k: int) -> tuple[Tensor, Tensor]:
    """scores: (*positions, L, E) -> the k largest weights (T, k), which sum to 1, and their indices."""
    top, indices = torch.topk(scores.select(-2, bank).flatten(0, -2).float() / temperature, k, -1)
    return torch.softmax(top, -1), indices
