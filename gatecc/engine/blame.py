"""blame: which rewrite at which site broke the contract, found by doing them one at a time on the recorded calls."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

from gatecc.capture import capture
from gatecc.capture.record import record_calls
from gatecc.capture.shield import callers_device, random_states_kept
from gatecc.capture.signature import flatten
from gatecc.errors import ContractError, GateccError
from gatecc.ir.printer import window
from gatecc.ir.program import Program
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.ir.site import Site
from gatecc.ir.weights import suspended
from gatecc.pipeline import Application, apply, prepare
from gatecc.scope.family import same_outputs
from gatecc.scope.state import Scope, base_forward, outside_scopes, scopes
from gatecc.scope.variant import Variant

_ROUNDING = 1e-5  # relative to max(1, max|output|)
Guilty = tuple[Rewrite, Site, fx.Node]  # and the node that its edit ends in


def blame(
    model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any], error: float, tolerance: float
) -> ContractError:
    """The error to raise: it names the first rewrite and site whose edit alone changes its scope's output."""
    found = f"outputs differ by {error:.3g} of max(1, max|output|)"
    expected = f"at most {tolerance:.3g}"
    for rewrite, site, edited in _guilty(model, recipe, args, kwargs):
        return ContractError(
            f"the rewrite promises {rewrite.contract()} and does not keep it",
            where=f"{rewrite} at {site.key} {site.line}".strip(),
            found=f"{found}\n{window(edited)}",
            expected=expected,
            do="declare changes_function if that is meant; else mend the rewrite",
        )
    untrue = next(_untrue(model, args, kwargs), None)
    if untrue is not None:
        return ContractError(
            "the captured graph does not compute what the module does",
            where=untrue,
            found=found,
            expected=expected,
            do="a graph holds no state that the module reads or sets while it runs (a global, "
            "torch.set_autocast_enabled, its own attributes): write it with arguments or a context manager, or select "
            "sites outside of it",
        )
    return ContractError(
        "the transformed model is not the original, though each rewrite alone keeps its contract",
        where=recipe.name,
        found=found,
        expected=expected,
        do="do the rewrites one by one to see which of them do not go together",
    )


def _untrue(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[str]:
    """The scopes whose graph before any rewrite gives other outputs than the module's own forward."""
    outermost = set(outside_scopes(model))
    found = [(fqn, module, state) for fqn, module, state in scopes(model) if fqn in outermost]
    calls, _ = record_calls(model, [fqn for fqn, _, _ in found], args, kwargs)
    for fqn, module, state in found:
        for call in calls[fqn]:
            _, leaves = flatten(call.args, call.kwargs)
            with suspended(module, state.changes):
                captured = prepare(_captured(module, state, call.args, call.kwargs)).program
                graph = _run(Variant(captured, ()), module, leaves)
                own = _run(lambda *_: base_forward(module)(*call.args, **call.kwargs), module, leaves)  # noqa: B023
            if not same_outputs(own, graph, _ROUNDING):
                yield fqn or type(module).__name__


def _guilty(model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Guilty]:
    outermost = set(outside_scopes(model))
    found = [(fqn, module, state) for fqn, module, state in scopes(model) if fqn in outermost]
    calls, _ = record_calls(model, [fqn for fqn, _, _ in found], args, kwargs)
    for fqn, module, state in found:
        for call in calls[fqn]:
            yield from _in_scope(module, state, recipe, call.args, call.kwargs)


def _in_scope(module: nn.Module, state: Scope, recipe: Recipe, args: Any, kwargs: Any) -> Iterator[Guilty]:
    _, leaves = flatten(args, kwargs)
    for application in state.applied:
        if application.rewrite not in recipe.rewrites or not application.rewrite.contract().checked:
            continue
        for place in application.sites:
            with suspended(module, state.changes):
                prepared = prepare(_captured(module, state, args, kwargs))
                before = _run(Variant(prepared.program, ()), module, leaves)
            try:
                ((edit,),) = apply(prepared, [Application(application.rewrite, (place,))], own=set(state.own))
            except GateccError:
                continue
            after = _run(Variant(prepared.program, ()), module, leaves)
            if not same_outputs(before, after, application.rewrite.contract().allowed(1)):
                nodes = sorted(edit.inserted)
                yield application.rewrite, edit.site, nodes[-1] if nodes else edit.site_node


def _run(variant: Callable[[nn.Module, list[torch.Tensor]], Any], module: nn.Module, leaves: list[torch.Tensor]) -> Any:
    with torch.no_grad(), random_states_kept(), callers_device():
        torch.manual_seed(0)
        return variant(module, leaves)


def _captured(module: nn.Module, state: Scope, args: Any, kwargs: Any) -> Program:
    return capture(module, args, kwargs, fqn=state.fqn, forward=base_forward(module), hooked=())
