"""checks: what holds of a recipe, tried on the models that its registration names. docs/checks.md defines the words."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from gatecc.capture.flops import counted
from gatecc.capture.signature import map_tensors, split_inputs
from gatecc.decoder import decoder
from gatecc.engine.contracts import compare
from gatecc.errors import ArgumentError, CheckFailedError
from gatecc.export import export
from gatecc.ir.rewrite import Recipe
from gatecc.recipes.registry import Case, Check, build, recipes
from gatecc.transform import last_report, revert, transform

__all__ = ["CHECKS", "Case", "Check", "Outcome", "run", "run_case"]

Forward = Callable[..., Any]


@dataclass(frozen=True)
class Outcome:
    """One check that held: of which recipe, on which sample, and the figure that was compared."""

    recipe: str
    sample: str
    check: Check
    measured: float

    def __str__(self) -> str:
        return f"{self.recipe} on {self.sample}: {self.check} holds ({self.measured:.1e})"


def run(recipe: str) -> list[Outcome]:
    """Every check of a recipe on every case of its registration.

    Raises CheckFailedError for the first that does not hold, UnknownRecipeError for a name that nobody registered, and
    what `transform` raises.
    """
    info = next((info for info in recipes() if info.name == recipe), None)
    if info is None:
        build(recipe)  # raises the error that names the nearest ones
        raise AssertionError("a recipe that builds is registered")
    return [outcome for case in info.cases for outcome in run_case(build(recipe, **case.options), case)]


def run_case(recipe: Recipe, case: Case) -> list[Outcome]:
    """The checks of one case on a recipe."""
    model, inputs = case.sample()
    subject = Subject(recipe, model, *split_inputs(inputs))
    name = getattr(case.sample, "__name__", type(model).__name__)
    made: list[Outcome] = []
    for check in case.checks:
        if check not in CHECKS:
            raise ArgumentError("no check has this name", found=repr(check), expected=", ".join(CHECKS))
        measured, allowed, found = CHECKS[check](subject)
        if not measured <= allowed:
            raise CheckFailedError(
                f"the recipe {recipe.name} does not hold: {check}",
                where=name,
                found=f"{found}: {measured:.3g}",
                expected=f"at most {allowed:.3g}",
                do="mend the rewrite, or take the check out of the recipe's cases if it does not claim this",
            )
        made.append(Outcome(recipe.name, name, check, measured))
    return made


@dataclass
class Subject:
    """A model before and after a recipe. ``started`` is as it starts, ``moved`` has noise on its new parameters."""

    recipe: Recipe
    model: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    @cached_property
    def started(self) -> nn.Module:
        """What `transform` makes."""
        return transform(self.model, self.recipe, (self.args, self.kwargs))

    @cached_property
    def moved(self) -> nn.Module:
        """The same with values in its new parameters that matter."""
        model = copy.deepcopy(self.started)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.new(model).values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        return model

    def new(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The parameters that the recipe added."""
        known = dict(self.model.named_parameters())
        return {name: p for name, p in model.named_parameters() if name not in known}

    def call(self, model: Forward) -> Any:
        """The output on the example inputs, without gradients."""
        with torch.no_grad():
            return model(*self.args, **self.kwargs)


Result = tuple[float, float, str]  # measured, allowed, what was measured


def identity(subject: Subject) -> Result:
    """As it starts, the model computes what it did, on the example inputs and on one sample of them."""
    worst = compare(subject.call(subject.model), subject.call(subject.started))
    contracts = [rewrite.contract() for rewrite in subject.recipe.rewrites]
    allowed = sum(contract.allowed(1) for contract in contracts if contract.checked)
    one: tuple[Any, Any] = map_tensors(lambda x: x[:1] if x.dim() else x, (subject.args, subject.kwargs))
    with torch.no_grad():
        worst = max(worst, compare(subject.model(*one[0], **one[1]), subject.started(*one[0], **one[1])))
    return worst, max(allowed, 1e-6), "outputs differ from the original's"


def causality(subject: Subject) -> Result:
    """With random gates, outputs up to a token do not change when later tokens do: axis 1 of the first input.

    Where a rewrite is causal for whole blocks (`Effects.causal_block`), outputs up to the block of that token.
    """
    blocks = [rewrite.effects().causal_block for rewrite in subject.recipe.rewrites]
    first = next(x for x in pytree.tree_leaves((subject.args, subject.kwargs)) if isinstance(x, Tensor))
    before = _first(subject.call(subject.moved))
    worst, moved = 0.0, 0.0
    for at in range(1, first.size(1)):
        later = torch.cat([first[:, :at], first[:, at:].flip(0)], 1)
        args, kwargs = map_tensors(lambda x, y=later: y if x is first else x, (subject.args, subject.kwargs))
        with torch.no_grad():
            after = _first(subject.moved(*args, **kwargs))
        stays = min(at // block * block for block in blocks)
        if stays:
            worst = max(worst, float((after[:, :stays] - before[:, :stays]).abs().max()))
        moved = max(moved, float((after[:, at:] - before[:, at:]).abs().max()))
    if not moved:
        return float("inf"), 1e-5, "later tokens change nothing at all"
    return worst, 1e-5, "outputs before the changed tokens moved by"


def cost(subject: Subject) -> Result:
    """The operations that the report counts are those that torch counts while the rewritten model runs."""
    totals = last_report(subject.started).totals
    _, ran = counted(lambda: subject.call(subject.started))
    reported = totals.flops_after or 0
    return (
        abs(ran - reported) / max(ran, 1),
        1e-9,
        f"{reported} FLOPs in the report and {ran} counted differ by a part of",
    )


def gradient(subject: Subject) -> Result:
    """With random gates, every new parameter that trains has a finite gradient that is not zero; frozen ones none."""
    model = subject.moved
    model.zero_grad()
    out = _first(model(*subject.args, **subject.kwargs))
    (out * torch.linspace(-1, 1, out.size(-1))).square().mean().backward()
    wrong = [
        name
        for name, p in subject.new(model).items()
        if (p.grad is None) == p.requires_grad
        or (p.grad is not None and not (bool(p.grad.isfinite().all()) and float(p.grad.abs().sum()) > 0))
    ]
    model.zero_grad()
    return float(len(wrong)), 0.0, f"wrong gradients of {', '.join(wrong) or 'none'}"


def exported(subject: Subject) -> Result:
    """With random gates, the ONNX graph computes in ONNX Runtime what torch does, at every size that is compared."""
    with tempfile.TemporaryDirectory() as folder:
        made = export(subject.moved, f"{folder}/out", (subject.args, subject.kwargs))
    return max((c.error for c in made.compared), default=float("inf")), 1e-4, "ONNX Runtime differs by"


def state(subject: Subject) -> Result:
    """With random gates, prefill and single steps of the derived decoder are the full forward."""
    ids = next(x for x in pytree.tree_leaves((subject.args, subject.kwargs)) if isinstance(x, Tensor))
    made = decoder(subject.moved, (subject.args, subject.kwargs))
    expected = _first(subject.call(subject.moved))
    logits, held = made.prefill(ids[:, :2])
    parts = [logits]
    for at in range(2, ids.size(1)):
        logits, held = made.step(ids[:, at : at + 1], held)
        parts.append(logits)
    return compare(expected, torch.cat(parts, 1)), 1e-4, "steps differ from the full forward by"


def reversible(subject: Subject) -> Result:
    """Reverting gives the state dict and the outputs of before, bitwise."""
    back = revert(subject.moved)
    then, now = subject.model.state_dict(), back.state_dict()
    lost = [n for n in then if n not in now or not torch.equal(then[n], now[n])] + [n for n in now if n not in then]
    same = compare(subject.call(subject.model), subject.call(back)) == 0
    return float(len(lost) + (not same)), 0.0, f"not as before: {', '.join(lost) or 'outputs'}"


CHECKS: dict[Check, Callable[[Subject], Result]] = {
    "identity": identity,
    "causality": causality,
    "cost": cost,
    "gradient": gradient,
    "export": exported,
    "state": state,
    "reversible": reversible,
}
assert set(CHECKS) == set(get_args(Check))


def _first(output: Any) -> Tensor:
    """The first floating point tensor of an output."""
    return next(x for x in pytree.tree_leaves(output) if isinstance(x, Tensor) and x.is_floating_point())
