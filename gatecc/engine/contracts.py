"""check: the declared contracts, numerically: the transformed model against the original, at two sizes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.adapters import adapted
from gatecc.capture.outputs import output_leaves
from gatecc.capture.shield import callers_device, random_states_kept
from gatecc.capture.signature import CONSTANTS, copied
from gatecc.engine.blame import blame
from gatecc.engine.parts import worst_part
from gatecc.errors import ExampleInputsError, SiteRefusedError
from gatecc.ir.rewrite import Recipe, Rewrite
from gatecc.scope.family import difference
from gatecc.scope.state import scopes

Call = tuple[tuple[Any, ...], dict[str, Any]]
_ROUNDING = 1e-3  # a difference up to here may be that of float32, and is looked for in the parts
_ROUNDING_OF_16_BITS = 0.1


@dataclass
class Reference:
    """The original's inputs and outputs: on the example, and at another size if the model runs there."""

    calls: list[Call]
    outputs: list[Any]
    notes: list[str] = field(default_factory=list[str])


@dataclass(frozen=True)
class Checked:
    """What the numerical check measured. ``error`` is relative to max(1, max|output|)."""

    error: float
    contract: str
    notes: tuple[str, ...] = ()


def reference(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Reference:
    """Run the original once on the example inputs. Raises ExampleInputsError if it does not run."""
    made = Reference([(args, kwargs)], [_run(model, args, kwargs)])
    if not any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(made.outputs)):
        kind = type(made.outputs[0]).__name__
        made.notes.append(f"no output was compared: torch does not know what a {kind} holds (register it as a pytree)")
    return made


def at_another_size(made: Reference, model: nn.Module, other: Call | str) -> None:
    """Run the original once more, with one sample more; or note why not, which ``other`` says then."""
    if isinstance(other, str):
        made.notes.append(f"checked at one size: {other}")
        return
    try:
        made.outputs.append(_run(model, *other))
    except ExampleInputsError as e:
        made.notes.append(f"checked at one size: the original does not run at others ({e.found})")
        return
    made.calls.append(other)


def _run(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    try:
        with torch.no_grad(), adapted(model), random_states_kept(), callers_device():
            torch.manual_seed(0)
            args, kwargs = copied((args, kwargs))
            return model(*args, **kwargs)
    except Exception as e:
        first = str(e).strip().splitlines()
        raise ExampleInputsError(
            "the model does not run on the example inputs",
            where=type(model).__name__,
            found=f"{type(e).__name__}: {first[0] if first else ''}",
            expected="inputs with which model(*args, **kwargs) runs",
            do="call the model with them once by hand; a tuple is positional, a dict is keyword arguments",
        ) from e


def check(
    before: Reference, model: nn.Module, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Checked:
    """Compare a transformed model with its reference. Raises ContractError, naming the guilty rewrite and site."""
    contracts = [r.contract() for r in recipe.rewrites]
    tolerance = sum(r.contract().allowed(_sites(model, r)) for r in recipe.rewrites)
    worst = 0.0
    notes: list[str] = list(before.notes)
    for number, (call, expected) in enumerate(zip(before.calls, before.outputs, strict=True)):
        try:
            got = _called(model, call, gradients=True)
        except SiteRefusedError as e:
            if number == 0:
                raise
            notes.append(f"checked at one size: the rewrite is made for this one ({e.found})")
            continue
        if any(rewrite.effects().loses_outputs for rewrite in recipe.rewrites):
            expected, got = _without_lost(expected, got, notes)
        gap = compare(expected, got)
        if not gap <= tolerance:  # the original ran without gradients, and a model may compute otherwise there
            gap = min(gap, compare(expected, _called(model, call, gradients=False)))
        worst = max(worst, gap)
    if tolerance < worst <= _rounding(model):
        part = worst_part(model, before.calls, tolerance, _run, compare)
        if part <= tolerance:
            notes.append(f"outputs differ by {worst:.1e}, no part of the model by more than {part:.1e}: rounding")
            worst = part
    if worst > tolerance or worst == float("inf") or worst != worst:
        raise blame(model, recipe, args, kwargs, worst, tolerance)
    return Checked(worst, "; ".join(dict.fromkeys(str(c) for c in contracts)), tuple(notes))


def _called(model: nn.Module, call: Call, gradients: bool) -> Any:
    with torch.set_grad_enabled(gradients), adapted(model), random_states_kept(), callers_device():
        torch.manual_seed(0)
        args, kwargs = copied(call)
        return model(*args, **kwargs)


def _without_lost(expected: Any, got: Any, notes: list[str]) -> tuple[Any, Any]:
    """Both outputs without what is None now: attention that was replaced has no weights to show."""
    had, has = ({leaf.path: leaf.value for leaf in output_leaves(output)} for output in (expected, got))
    lost = [path for path in had if path not in has]
    if not lost or not has or not has.keys() <= had.keys():
        return expected, got
    note = f"the model shows no attention weights any more: its output has no {', '.join('.'.join(p) for p in lost)}"
    notes += [note] if note not in notes else []
    return {path: had[path] for path in has}, has


def _rounding(model: nn.Module) -> float:
    """How far outputs may differ for no other reason than the dtype of the model."""
    short = any(p.is_floating_point() and p.element_size() < 4 for p in model.parameters())
    return _ROUNDING_OF_16_BITS if short else _ROUNDING


def _sites(model: nn.Module, rewrite: Rewrite) -> int:
    """How many sites of a model a rewrite was done at."""
    applied = [a for _, _, state in scopes(model) for a in state.applied if a.rewrite == rewrite]
    return max(1, sum(len(a.sites) for a in applied))


def compare(expected: Any, got: Any) -> float:
    """The largest difference over all output leaves; infinite if structure, constants, shapes or dtypes differ."""
    left, spec = pytree.tree_flatten(expected)
    right, other = pytree.tree_flatten(got)
    if spec != other:
        return float("inf")
    worst = 0.0
    for x, y in zip(left, right, strict=True):
        worst = max(worst, _leaf(x, y))
    return worst


def _leaf(x: Any, y: Any) -> float:
    """None is a leaf too. Objects that torch cannot look into are compared by their type alone."""
    if isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor):
        return difference(x, y) if x.shape == y.shape and x.dtype == y.dtype else float("inf")
    alike = type(x) is type(y) and not (isinstance(x, CONSTANTS) and x != y)
    return 0.0 if alike else float("inf")
