"""Choose: give an ensemble a router that chooses between its members for each sample."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.contract import Contract, changes_function
from gatecc.ir.edit import Editor
from gatecc.ir.effects import Effects
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.router import RouterSpec
from gatecc.ir.site import Site
from gatecc.ir.weights import Effect, NewModule
from gatecc.passes.ensemble.chooser import Chooser, read_all
from gatecc.passes.ensemble.ensemble import ROUTER, Ensemble
from gatecc.passes.ensemble.outputs import COMBINES


@dataclass(frozen=True)
class Choose(Rewrite):
    """Choose between the members of an ensemble (`gatecc.ensemble`) for each sample; who is not chosen does not run.

    ``router``: its source names inputs, features and members of the ensemble; the word ``features`` stands for all
    features. ``combine``: "sum" of the weighted outputs, "unit" the sum divided by its norm, "smooth" of probabilities,
    where each member's are mixed with the uniform distribution over its ``classes`` as far as it is not chosen (COSMO).

    ``penalties`` are what a choice ``least`` adds to the predicted loss of each member, ``size`` and ``flops`` weigh a
    member's parameters and operations, relative to the largest member's.

    The graph of an ensemble would hold every member, so this rewrite is done on the model in Python: the site is the
    model itself, and nothing is captured.
    """

    name = "choose"

    router: RouterSpec
    combine: Literal["sum", "smooth", "unit"] = "sum"
    classes: tuple[tuple[int, ...], ...] = ()
    penalties: tuple[float, ...] = ()
    size: float = 0.0
    flops: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(tuple(own) for own in self.classes))
        object.__setattr__(self, "penalties", tuple(self.penalties))
        if self.combine not in COMBINES:
            raise ArgumentError(
                "an ensemble cannot put outputs together so", found=self.combine, expected=", ".join(COMBINES)
            )
        if self.site.kind != "model":
            raise ArgumentError("members are chosen at the model itself", found=str(self.site), expected="model[...]")

    def contract(self) -> Contract:
        return changes_function()

    def effects(self) -> Effects:
        return Effects(in_python=True)

    def rewrite(self, site: Site, edit: Editor) -> None:
        raise _no_ensemble(type(edit.program.module).__name__)

    def install(self, model: nn.Module) -> Sequence[Effect]:
        if not isinstance(model, Ensemble):
            raise _no_ensemble(type(model).__name__)
        if model.chooser is not None:
            raise SiteRefusedError(
                "the ensemble has a router already",
                found=str(model.chooser.router),
                do="gatecc.revert(ensemble) takes it off",
            )
        return (NewModule(ROUTER, lambda: self._build(model)),)

    def remarks(self, model: nn.Module) -> Iterable[str]:
        if not isinstance(model, Ensemble) or (chooser := model.chooser) is None:
            return
        yield f"the router reads {', '.join(chooser.reads) or 'nothing'}: that runs for every sample"
        paths = {name: model.path([name]) for name in model.members}
        if chooser.k == 1:
            yield from (f"a sample of {name}: {cost}" for name, cost in paths.items())
        yield f"all members: {model.path(model.members)}"
        yield from self.router.notes

    def _build(self, ensemble: Ensemble) -> nn.Module:
        named = tuple(ensemble.features), ensemble.names, ensemble.inputs.all
        source = read_all(self.router.source, *named, ensemble.forms)
        spec = replace(self.router, source=source)
        made = Chooser(spec, ensemble.forms, len(ensemble.members), self.combine)
        if ensemble.whole and made.k != 1:
            raise ArgumentError(
                "outputs that are whole numbers cannot be weighted",
                found=f"{made.k} members for each sample",
                do="choose one (k=1), or take another part of the members' output: output=...",
            )
        if self.combine == "smooth":
            made.uniform = self._uniform(ensemble)
        if "cost" in dict(made.named_buffers()):
            made.get_buffer("cost").copy_(self._cost(ensemble))
        elif self.penalties or self.size or self.flops:
            raise ArgumentError("this choice knows no costs", found=str(spec.choice), expected="least")
        return made.to(next((p.device for p in ensemble.parameters()), torch.device("cpu")))

    def _cost(self, ensemble: Ensemble) -> Tensor:
        costs = [ensemble.costs[name] for name in ensemble.members]
        if self.penalties and len(self.penalties) != len(costs):
            raise ArgumentError(
                "there is not one penalty for each member",
                found=f"{len(self.penalties)} penalties",
                expected=f"{len(costs)}: {', '.join(ensemble.members)}",
            )
        total = torch.tensor(self.penalties or [0.0] * len(costs))
        for weight, sizes in (
            (self.size, [c.parameters for c in costs]),
            (self.flops, [c.flops for c in costs]),
        ):
            total = total + weight * torch.tensor(sizes, dtype=torch.float32) / max(*sizes, 1)
        return total

    def _uniform(self, ensemble: Ensemble) -> Tensor:
        """(E, C): each member's classes with equal probabilities."""
        form = ensemble.forms[ensemble.names[0]]
        if form is None or len(form.shape) != 2:
            raise ArgumentError(
                "smooth mixes probabilities",
                found="outputs that are no tensor" if form is None else str(form),
                expected="one row of probabilities per sample from each member",
                do='take them: output="logits", project={member: nn.Softmax(-1)}',
            )
        if len(self.classes) != len(ensemble.members) or not all(self.classes):
            raise ArgumentError(
                "smooth needs the classes that each member knows",
                found=f"{len(self.classes)} lists",
                expected=f"one list of class numbers for each of {', '.join(ensemble.members)}",
            )
        made = torch.zeros(len(self.classes), form.shape[1])
        for row, own in zip(made, self.classes, strict=True):
            if any(not 0 <= c < form.shape[1] for c in own) or len(set(own)) != len(own):
                raise ArgumentError("no such classes", found=str(own), expected=f"numbers of 0 to {form.shape[1] - 1}")
            row[list(own)] = 1 / len(own)
        return made


def _no_ensemble(found: str) -> SiteRefusedError:
    return SiteRefusedError(
        "the rewrite chooses between the members of an ensemble, and this is none",
        found=found,
        expected="what gatecc.ensemble made, itself and not a part of a larger model",
        do="gatecc.ensemble({name: model, ...}, example_inputs)",
    )
