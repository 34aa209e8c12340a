"""Notes: what a report says of a transform that did as it was told, and perhaps not what was meant."""

from __future__ import annotations

import gc
import sys
from collections.abc import Collection, Iterator, Sequence

from torch import nn

from gatecc.ir.rewrite import Recipe
from gatecc.ir.select import left_alone, select
from gatecc.ir.site import Site
from gatecc.report import Report


def again(recipe: Recipe, report: Report, earlier: Sequence[tuple[Recipe, Report]]) -> Iterator[str]:
    """A rewrite that the model holds already, at the same sites: a notebook cell that was run twice."""
    now = {(row.rewrite, row.site) for row in report.rewrites}
    for number, (other, its) in enumerate(earlier, 1):
        alike = {(r.name, r.site.stage) for r in other.rewrites}
        same = {r.name for r in recipe.rewrites if (r.name, r.site.stage) in alike}
        sites = {site for name, site in now & {(row.rewrite, row.site) for row in its.rewrites} if name in same}
        if sites:
            exact = all(r in other.rewrites for r in recipe.rewrites if r.name in same)
            yield (
                f"the model holds {', '.join(sorted(same))} of {other.name} already (transform {number}"
                f"{'' if exact else ', with other options'}), at {len(sites)} of these sites: the new one comes on "
                "top of it. gatecc.revert(model) takes all off"
            )
    doubled = [r for i, r in enumerate(recipe.rewrites) if r in recipe.rewrites[:i]]
    yield from (f"{rewrite} is in the list twice: the second comes on top of the first" for rewrite in doubled)


def edits(recipe: Recipe, sites: Sequence[Site]) -> Iterator[str]:
    """What the rewrites say of their sites themselves."""
    for rewrite in recipe.rewrites:
        if rewrite.effects().in_python:
            continue
        for site in select(rewrite.site, sites):
            yield from rewrite.notes(site)


def kept(recipe: Recipe, report: Report) -> Iterator[str]:
    """Sites that should be left as they are, and that are not there."""
    for rewrite in recipe.rewrites:
        if rewrite.site.besides is None:
            continue
        kind = rewrite.site.kind
        sites = [row for row in report.sites if row.kind == kind]
        if not left_alone(rewrite.site, sites):
            yield f"{rewrite}: what is kept matches none of the {len(sites)} {kind} sites: all are rewritten"


def optimizer(model: nn.Module, target: nn.Module, old: Collection[int]) -> Iterator[str]:
    """An optimizer that was made before: it trains none of the copy's parameters, and none of the new ones.

    ``old``: the ids of the parameters that the model had.
    """
    new = [p for p in target.parameters() if id(p) not in old]
    if not new or not _optimized(model):
        return
    if target is model:
        yield (
            "an optimizer was made before the transform and does not hold the new parameters: "
            "optimizer.add_param_group them, or make it anew"
        )
    else:
        yield (
            "an optimizer holds the parameters of the model that was given, and the result is a copy: "
            "make the optimizer after the transform, or pass inplace=True and add the new parameters to it"
        )


def _optimized(model: nn.Module) -> bool:
    """Whether a parameter is in the ``params`` of an optimizer.

    The collector is asked only for a parameter that someone beside its module holds.
    """
    usual = max(_references(nn.Linear(1, 1)))
    held = [p for p, count in zip(model.parameters(), _references(model), strict=True) if count > usual]
    for parameter in held[:1]:
        lists = [found for found in gc.get_referrers(parameter) if type(found) is list]
        holders = [found for found in gc.get_referrers(*lists) if type(found) is dict] if lists else []
        if any(group.get("params") is entry for group in holders for entry in lists):
            return True
    return False


def _references(model: nn.Module) -> list[int]:
    return [sys.getrefcount(p) for p in model.parameters()]
