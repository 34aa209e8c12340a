"""Build: an ensemble from its members and one example call, on which everything that can be wrong is found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any, cast

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.flops import counted
from gatecc.capture.modes import in_eval
from gatecc.capture.shield import random_states_kept
from gatecc.capture.signature import split_inputs
from gatecc.errors import ArgumentError, ExampleInputsError, GateccError
from gatecc.passes.ensemble.arguments import Call, Names, call_of, names_of
from gatecc.passes.ensemble.chooser import Form
from gatecc.passes.ensemble.costs import Cost, parameters_of
from gatecc.passes.ensemble.ensemble import Ensemble
from gatecc.passes.ensemble.outputs import check_alike, rows_of

Models = Mapping[str, nn.Module] | Sequence[nn.Module]
Mappings = Mapping[str, Mapping[str, str | None]]


def ensemble(
    members: Models,
    example_inputs: Any,
    *,
    inputs: Mappings | None = None,
    output: str | Mapping[str, str] = "",
    project: Mapping[str, nn.Module] | None = None,
    features: Mapping[str, nn.Module] | None = None,
) -> Ensemble:
    """Put several whole models behind one call. A recipe for ensembles then chooses between them, for each sample.

    ``members``: models by name, or in order ("0", "1", ...); they keep their classes, and their parameters are
    ``members.NAME...``. ``example_inputs``: a tuple is positional, a dict is keyword arguments, ``(tuple, dict)`` is
    both; the first axis of every tensor counts samples. Each member is given the inputs whose names its forward has,
    and inputs without a name by their place; ``inputs={"member": {"parameter": "input"}}`` says otherwise. There a
    member may also read a feature or another member.

    ``output``: the part of a member's output that is taken ("logits", "hidden_states.0"), for all or by member; "" is
    all of it. What is taken has the same structure, shapes and dtypes in all members; ``project={"member": module}``
    brings it to that. ``features``: models that the router or members read, and that are never chosen.

    Until a recipe gives it a router, the ensemble runs every member and returns the mean of their outputs.

    Raises ArgumentError: no member, an argument that nobody gives, outputs that differ; ExampleInputsError: a member
    that does not run.
    """
    models = _named(members)
    others = dict(features or {})
    args, kwargs = split_inputs(example_inputs)
    names = names_of(models, inputs or {}, args, kwargs)
    every = {**others, **models}
    _check_names(names, models, others)
    _check_keys("inputs", inputs or {}, every)
    _check_keys("project", project or {}, every)
    calls = {n: call_of(n, m, (inputs or {}).get(n, {}), names, [o for o in every if o != n]) for n, m in every.items()}
    _check_used(names, calls)
    parts = dict.fromkeys(models, output) if isinstance(output, str) else dict(output)
    _check_keys("output", parts, every)
    made = Ensemble(models, others, project or {}, names, calls, parts, _order(calls))
    _try(made, names.bind(args, kwargs))
    return made


def _named(members: Models) -> dict[str, nn.Module]:
    named = dict(members) if isinstance(members, Mapping) else {str(i): m for i, m in enumerate(members)}
    if not named:
        raise ArgumentError("an ensemble without members", expected="gatecc.ensemble({name: model, ...}, inputs)")
    for name, module in named.items():
        if not isinstance(cast("Any", module), nn.Module):
            raise ArgumentError(
                "a member is no model", where=name, found=type(module).__name__, expected="a torch.nn.Module"
            )
    return named


def _check_names(names: Names, members: Mapping[str, nn.Module], features: Mapping[str, nn.Module]) -> None:
    for name in (*members, *features):
        if not name.replace("-", "_").isidentifier() and not name.isdecimal():
            raise ArgumentError("a name in the ensemble is no word", found=repr(name), expected="letters, digits, _, -")
        if hasattr(nn.ModuleDict, name):
            raise ArgumentError("a name in the ensemble is one that nn.ModuleDict has itself", found=name)
    for one, other in ((members, features), (names.all, (*members, *features))):
        if both := [name for name in one if name in other]:
            raise ArgumentError(
                "two things in the ensemble have the same name",
                found=", ".join(both),
                expected="inputs, features and members with names of their own",
            )


def _check_keys(what: str, mapping: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    if unknown := [name for name in mapping if name not in known]:
        raise ArgumentError(f"{what} names no member", found=", ".join(unknown), expected=", ".join(known))


def _check_used(names: Names, calls: Mapping[str, Call]) -> None:
    read = {name for call in calls.values() for name in call.reads}
    if unread := [name for name in names.all if name not in read]:
        raise ArgumentError(
            "nothing in the ensemble takes an input",
            found=", ".join(unread),
            do="name the parameter that it is for, inputs={member: {parameter: input}}; or leave it out; what only the "
            "router reads is a feature: features={name: nn.Identity()}, inputs={name: {'input': input}}",
        )


def _order(calls: Mapping[str, Call]) -> tuple[str, ...]:
    graph = {name: [read for read in call.reads if read in calls] for name, call in calls.items()}
    try:
        return tuple(TopologicalSorter(graph).static_order())
    except CycleError as e:
        raise ArgumentError("members read each other in a circle", found=" -> ".join(e.args[1])) from e


def _try(ensemble: Ensemble, inputs: dict[str, Any]) -> None:
    """Run everything once: forms and costs are written down, outputs compared."""
    rows = rows_of(list(inputs.values()))
    values = dict(inputs)
    with in_eval(ensemble), random_states_kept():
        for name in ensemble.order:
            values[name], flops = _counted(ensemble, name, values)
            held = (ensemble.model(name), *(m for n, m in ensemble.projections.items() if n == name))
            ensemble.costs[name] = Cost(parameters_of(held), flops / max(rows, 1))
    check_alike({name: values[name] for name in ensemble.members}, rows)
    ensemble.forms.update({name: Form.of(value) for name, value in values.items()})
    first = values[ensemble.names[0]]
    ensemble.whole = any(isinstance(x, Tensor) and not x.is_floating_point() for x in pytree.tree_leaves(first))


def _counted(ensemble: Ensemble, name: str, values: dict[str, Any]) -> tuple[Any, int]:
    try:
        return counted(lambda: ensemble.output_of(name, values))
    except GateccError:
        raise
    except Exception as e:
        raise ExampleInputsError(
            "a model of the ensemble does not run on the example inputs",
            where=name,
            found=f"{type(e).__name__}: {(str(e).strip().splitlines() or [''])[0]}",
            expected=f"inputs with which {type(ensemble.model(name)).__name__} runs",
            do="look at what it is given: "
            + ", ".join(f"{parameter}={value}" for parameter, value in ensemble.calls[name].arguments),
        ) from e
