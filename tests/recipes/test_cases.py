"""What the registration of each recipe claims holds on its samples; and each check notices a recipe that breaks it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc import checks
from gatecc.errors import ArgumentError, CheckFailedError, UnknownRecipeError
from gatecc.ir.contract import Contract, changes_function, identity_at_init
from gatecc.ir.edit import Editor
from gatecc.ir.rewrite import REWRITES, Recipe, Rewrite
from gatecc.ir.site import Site
from gatecc.recipes import samples
from gatecc.recipes.registry import Case, Check, recipe


@pytest.mark.broad(5)
@pytest.mark.parametrize("name", [info.name for info in gatecc.recipes()])
def test_what_a_recipe_claims_holds(name: str) -> None:
    info = next(info for info in gatecc.recipes() if info.name == name)
    outcomes = checks.run(name)
    assert [outcome.check for outcome in outcomes] == [check for case in info.cases for check in case.checks]


class Times(nn.Module):
    """y = (1 + w) x, or with ``dead`` y = x whatever w is; ``back`` reads the last token, ``start`` is w."""

    def __init__(self, start: float, dead: bool, back: bool) -> None:
        super().__init__()
        self.weight, self.dead, self.back = nn.Parameter(torch.full((16,), start)), dead, back

    def forward(self, x: Tensor) -> Tensor:
        if self.dead:
            return x + 0 * self.weight
        return x + self.weight * (x[:, -1:] if self.back else x)


@dataclass(frozen=True)
class Wrong(Rewrite):
    """A scale of a value that breaks what is asked for."""

    name: ClassVar[str] = "wrong"
    start: float = 0.0
    dead: bool = False
    back: bool = False

    def contract(self) -> Contract:
        return changes_function() if self.start else identity_at_init()

    def rewrite(self, site: Site, edit: Editor) -> None:
        value = site.values["out"].node
        path = edit.module("times", lambda: Times(self.start, self.dead, self.back))
        edit.replace(value, edit.call(path, value))


REWRITES.pop("wrong")


@pytest.mark.parametrize(
    ("check", "options"),
    [("identity", {"start": 0.5}), ("gradient", {"dead": True}), ("causality", {"back": True})],
)
def test_a_check_notices_a_recipe_that_breaks_it(check: Check, options: dict[str, Any]) -> None:
    right, broken = (Recipe("own", "", (Wrong(gatecc.MLP[...].out, **given),)) for given in ({}, options))
    case = Case(samples.language, (check,))
    assert [outcome.check for outcome in checks.run_case(right, case)] == [check]
    with pytest.raises(CheckFailedError, match=f"does not hold: {check}") as raised:
        checks.run_case(broken, case)
    assert raised.value.where == "language"


def test_wrong_names() -> None:
    with pytest.raises(UnknownRecipeError, match="gated-attention"):
        checks.run("gated-atention")
    with pytest.raises(ArgumentError, match="no check has this name"):
        checks.run_case(gatecc.recipe("stepnet"), Case(samples.language, ("beauty",)))  # pyright: ignore[reportArgumentType]
    with pytest.raises(ArgumentError, match="has no case"):
        recipe("empty", citation="", cases=[])
