"""Planning: which submodule is rewritten by which rewrites at which sites."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx, nn

from gatecc.capture.record import record_calls
from gatecc.engine.analyse import Analysis
from gatecc.errors import EmptySelectionError, SiteRefusedError
from gatecc.ir.edit import CONTAINERS
from gatecc.ir.mask import Mask
from gatecc.ir.program import Program, origin
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.select import select
from gatecc.ir.site import Attention, Refusal, Site
from gatecc.pipeline import Application
from gatecc.scope.masks import Proved, proved_masks, relative
from gatecc.scope.state import forward_hides_class, outside_scopes


@dataclass
class Plan:
    """What is to be done in one scope."""

    fqn: str
    applied: list[Application] = field(default_factory=list[Application])
    masks: Proved = field(default_factory=dict[tuple[str, int], Mask])  # of its attention sites, where it was proved


def called_modules(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[str]:
    """The FQNs of the modules whose forward runs and that can be scopes.

    Not among them: containers such as ModuleList, which are never called; the inside of a scope that is there already,
    which runs as one graph; and modules with a forward of their own, which hides that of their class.
    """
    calls, _ = record_calls(model, outside_scopes(model), args, kwargs)
    return {name for name, seen in calls.items() if seen and not forward_hides_class(model.get_submodule(name))}


def plans_of(
    model: nn.Module, recipe: Recipe, analysis: Analysis, scope: str, called: set[str], too_small: set[str]
) -> tuple[list[Plan], list[Refusal]]:
    """The scopes of a recipe: for each rewrite and site the smallest called module that holds all of the edit.

    The refusals are those of sites that were not asked for by name and lack a value that a rewrite needs. Sites whose
    scope is ``too_small`` are rewritten in the largest graph that was captured.
    """
    wanted: list[tuple[Rewrite, dict[str, list[Site]]]] = []
    left_out: list[Refusal] = []
    for rewrite in recipe.rewrites:
        chosen: dict[str, list[Site]] = {}
        by_tokens = any(r.effects().reads_mask and _same_sites(r, rewrite) for r in recipe.rewrites)
        fitting, refused = _fitting(rewrite, by_tokens, select(rewrite.site, analysis.sites, analysis.refusals))
        left_out += refused
        for site in fitting:
            program = analysis.program_of(site)
            largest = _within_shells(program.fqn, site, model, called - too_small)
            whole = scope == "model" or rewrite.effects().whole_model
            fqn = largest if whole else _scope_of(rewrite, site, model, called, program)
            chosen.setdefault(largest if fqn in too_small else fqn, []).append(site)
        wanted.append((rewrite, chosen))
    if not wanted:
        raise EmptySelectionError("the recipe has no rewrite", where=recipe.name)
    outer = _outermost({fqn for _, chosen in wanted for fqn in chosen})
    plans: dict[str, Plan] = {}
    for rewrite, chosen in wanted:
        merged: dict[str, list[Site]] = {}
        for fqn, sites in chosen.items():
            merged.setdefault(outer[fqn], []).extend(sites)
        for fqn, sites in merged.items():
            places = dict.fromkeys((relative(s.owner, fqn), s.ordinal) for s in sites)
            _check_calls(rewrite, sites, analysis.sites)
            plan = plans.setdefault(fqn, Plan(fqn))
            plan.applied.append(Application(rewrite, tuple(places)))
            plan.masks |= proved_masks(sites, fqn)
    return list(plans.values()), left_out


def _within_shells(fqn: str, site: Site, model: nn.Module, called: set[str]) -> str:
    """The module inside of the shells that peft puts around a model: it takes them off when adapters are merged, and a
    scope on one of them would go with it."""
    module, path = model.get_submodule(fqn), [fqn] if fqn else []
    while type(module).__module__.startswith("peft."):
        name = next((name for name in ("base_model", "model") if name in module._modules), "")
        if not name:
            return fqn
        module = module.get_submodule(name)
        path.append(name)
    inner = ".".join(path)
    return inner if inner in called and f"{site.owner}.".startswith(f"{inner}.") else fqn


def _same_sites(one: Rewrite, other: Rewrite) -> bool:
    """Whether two rewrites select the same sites, whatever their values."""
    return replace(one.site, stage="") == replace(other.site, stage="")


def _fitting(rewrite: Rewrite, by_tokens: bool, chosen: list[Site]) -> tuple[list[Site], list[Refusal]]:
    """The sites that have what a rewrite reads, and refusals of the others: with ``by_tokens``, which is set for
    rewrites that belong together with one that reads a mask over tokens, those where channels attend, too.

    Raises SiteRefusedError if none has, or if those sites were not selected by ``...`` but named.
    """
    refusals: list[Refusal] = []
    fitting: list[Site] = []
    for site in chosen:
        missing = [name for name in dict.fromkeys(rewrite.reads()) if site.find(name) is None]
        between = by_tokens and isinstance(site, Attention) and site.over == "channels"
        if not missing and not between:
            fitting.append(site)
            continue
        values = " and ".join(repr(name) for name in missing)
        found, remedy = site.absence(missing[0]) if missing else ("", "")
        reason = f"{rewrite} needs {values}; {found}"
        if between:
            reason = f"{rewrite} is made for tokens that attend to tokens; here channels attend to channels"
            remedy = "gate its heads, which have a number for each token"
        refusals.append(Refusal(SiteRefusedError.code, site.kind, site.owner, site.line, reason, remedy))
    if refusals and (not fitting or rewrite.site.where is not ...):
        first = refusals[0]
        raise SiteRefusedError(
            "a selected site cannot take the rewrite",
            where=f"{first.owner} {first.line}".strip(),
            found=first.reason,
            do=f"{first.remedy}, or select the sites that have it (... leaves the others out)",
        )
    return fitting, refusals


def _outermost(scopes: set[str]) -> dict[str, str]:
    """The scope that each scope lies in, if any: rewrites of one recipe that meet are done in one graph, in order."""
    return {fqn: min((o for o in scopes if not o or f"{fqn}.".startswith(f"{o}.")), key=len) for fqn in scopes}


def _check_calls(rewrite: Rewrite, chosen: list[Site], sites: list[Site]) -> None:
    """A module that runs several times is one module: all of its calls are rewritten, or none."""
    for site in chosen:
        same = [s for s in sites if (s.kind, s.owner, s.ordinal) == (site.kind, site.owner, site.ordinal)]
        if any(s not in chosen for s in same):
            raise EmptySelectionError(
                f"{rewrite} selects some calls of a module that runs {len(same)} times",
                where=site.owner,
                found=f"{site.key} alone",
                do="select the owner by its FQN: its calls share one set of weights",
            )


def _scope_of(rewrite: Rewrite, site: Site, model: nn.Module, called: set[str], program: Program) -> str:
    """The smallest called module whose graph holds everything that the rewrite touches at a site."""
    fqn = site.owner
    for value in map(site.find, rewrite.reads()):
        if value is not None:
            fqn = _common(fqn, _nearest(value.node, site.owner))
    for reader in rewrite.readers(site):
        fqn = _common(fqn, reader)
    while fqn and (fqn not in called or isinstance(model.get_submodule(fqn), CONTAINERS)):
        fqn = fqn.rpartition(".")[0]
    return fqn if program.inside(fqn) else program.fqn


def _nearest(node: fx.Node, owner: str) -> str:
    """Where the scope can get hold of a value: the owner that makes it, or the nearest one that reads it."""
    owners = [origin(n).owner for n in (node, *node.users) if n.op == "call_function"]
    return max(owners, key=lambda o: len(_common(o, owner)), default="")


def _common(a: str, b: str) -> str:
    parts: list[str] = []
    for x, y in zip(a.split("."), b.split("."), strict=False):
        if x != y:
            break
        parts.append(x)
    return ".".join(parts)
