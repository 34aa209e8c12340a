"""Subset: which members of an ensemble a budget allows, and the best of those sets (the coarse level of MoE²)."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from gatecc.errors import ArgumentError, TrainingError
from gatecc.passes.ensemble.ensemble import Ensemble


@dataclass(frozen=True)
class Budget:
    """A limit on what a set of members costs: ``costs`` of each member, added up (energy) or the largest (latency)."""

    costs: Mapping[str, float]
    limit: float
    over: Literal["sum", "max"] = "sum"

    def of(self, members: Collection[str]) -> float:
        """What a set of members costs."""
        found = [self.costs[name] for name in members]
        return max(found, default=0.0) if self.over == "max" else sum(found)

    def allows(self, members: Collection[str]) -> bool:
        """Whether a set of members stays within the limit."""
        return self.of(members) <= self.limit


def choose_subset(
    ensemble: Ensemble, value: Callable[[tuple[str, ...]], float], budgets: Sequence[Budget]
) -> tuple[str, ...]:
    """The members with the largest value of all sets that every budget allows.

    ``value`` must not fall when a member is added (a gate trained on all members can always give it weight 0), so only
    sets to which no member can be added are tried: all of them, and the first of equal ones wins. For tens of members;
    the number of such sets can grow like 2^E.

    Raises ArgumentError for a member without a cost or one that costs less than nothing, and if no budget allows any
    member.
    """
    names = ensemble.names
    for budget in budgets:
        if wrong := [n for n in names if n not in budget.costs or not budget.costs[n] >= 0]:
            raise ArgumentError(
                "a budget needs a cost of each member", found=f"none, or a negative one, of {', '.join(wrong)}"
            )
    found = list(_maximal(names, budgets))
    if not found:
        raise ArgumentError(
            "no member is within the budget",
            found="; ".join(f"the cheapest costs {min(b.costs[n] for n in names):g} of {b.limit:g}" for b in budgets),
            do="raise a limit, or add a smaller member",
        )
    return max(found, key=value)


def restrict(ensemble: Ensemble, members: Collection[str]) -> None:
    """Let the router choose among these members only, from now on; saved with the model.

    Raises TrainingError if the router cannot be restricted (recipe ``moe2``), ArgumentError for no or unknown members.
    """
    allowed = None if ensemble.chooser is None else dict(ensemble.chooser.named_buffers()).get("allowed")
    if allowed is None:
        raise TrainingError(
            "the ensemble has no router that can be restricted", expected='gatecc.transform(ensemble, "moe2", inputs)'
        )
    unknown = [name for name in members if name not in ensemble.members]
    if unknown or not members:
        raise ArgumentError(
            "an ensemble is restricted to some of its members",
            found=", ".join(unknown) or "none",
            expected=", ".join(ensemble.members),
        )
    allowed.copy_(torch.tensor([name in members for name in ensemble.members]))


def _maximal(names: Sequence[str], budgets: Sequence[Budget]) -> Iterator[tuple[str, ...]]:
    """The sets of members within all budgets to which no other can be added. Costs do not fall when a member comes in,
    so what is over a limit stays over it."""

    def fits(members: Collection[str]) -> bool:
        return all(budget.allows(members) for budget in budgets)

    def grow(chosen: tuple[str, ...], rest: Sequence[str]) -> Iterator[tuple[str, ...]]:
        if not rest:
            if chosen and not any(fits((*chosen, name)) for name in names if name not in chosen):
                yield chosen
            return
        with_it = (*chosen, rest[0])
        if fits(with_it):
            yield from grow(with_it, rest[1:])
        yield from grow(chosen, rest[1:])

    yield from grow((), names)
