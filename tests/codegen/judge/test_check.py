"""Checking a family: what is right passes, and each kind of fault is named."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from types import ModuleType, SimpleNamespace
from typing import Any, cast

import pytest
import torch
from typer.testing import CliRunner

from gatecc.cli import app
from gatecc.codegen.judge import check as checking
from gatecc.codegen.judge import family as registry
from gatecc.codegen.judge.device import judge_on_device
from gatecc.codegen.judge.family import Exemption, Family
from gatecc.codegen.judge.interpreted import interpreting
from gatecc.errors import ArgumentError
from tests.codegen.judge.toys import FAMILY
from tools.binaries import summed

Judged = Callable[[Family], None]
NUMBERS = count()  # what a module speaks of is asked for once


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> Judged:
    """Only this family is registered, by a module of its own."""

    def register(family: Family) -> None:
        name = f"{__name__}.registered{next(NUMBERS)}"
        monkeypatch.setitem(sys.modules, name, cast("ModuleType", SimpleNamespace(FAMILY=family)))
        monkeypatch.setattr(registry, "_MODULES", [name])

    return register


def faults(**options: Any) -> list[str]:
    options = {"targets": ["sm_80"], "dtypes": ["fp32"], **options}
    return [fault for found in checking.check(**options) for fault in found.faults]


def test_a_right_kernel_passes(judged: Judged) -> None:
    judged(FAMILY)
    found = list(checking.check(targets=["sm_80", "gfx942"], dtypes=["bf16", "fp32"]))
    assert [f.faults for f in found] == [()] * 6


def odd(**options: Any) -> dict[str, Any]:
    return {"x": torch.randn(100, dtype=torch.float64), **options}


SPOILED: dict[str, tuple[dict[str, Any], str]] = {
    "wrong": ({"cases": {"odd": lambda: odd(factor=3.001)}}, "y errs by"),
    "outside": ({"cases": {"odd": lambda: odd(masked=False)}}, "load: 1948 of 2048"),
    "no number": ({"cases": {"odd": lambda: odd(factor="a")}}, "does not run"),
    "no case": ({"cases": {}}, "no case runs scaled"),
    "no size": ({"sizes": {}}, "no size launches it"),
    "budget": ({"exemptions": (Exemption("scaled", "vector", 32, "as a test"),)}, "16 bytes at once"),
    "no compilation": (
        {"sizes": {"1": lambda dtype: FAMILY.module().launch(torch.empty(8, device="meta"), "a", True)}},
        "does not compile",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_fault_is_named(judged: Judged, name: str) -> None:
    change, word = SPOILED[name]
    judged(replace(FAMILY, **change))
    assert [fault for fault in faults() if word in fault]


def test_an_exemption_raises_what_is_allowed(judged: Judged) -> None:
    wrong = {"odd": lambda: odd(factor=3.001)}
    for dtypes, passes in (((), True), (("fp32",), True), (("bf16",), False)):
        exemption = Exemption("odd", "error", 1e4, "as a test", dtypes)
        judged(replace(FAMILY, cases=wrong, exemptions=(exemption,)))
        assert bool(faults(compiling=False)) is not passes


@pytest.mark.parametrize("option", ["only", "targets", "dtypes"])
def test_a_name_that_does_not_exist(judged: Judged, option: str) -> None:
    judged(FAMILY)
    with pytest.raises(ArgumentError, match="of this name"):
        faults(**{option: ["sm_1"]})


def test_only_a_kernel_is_compiled(judged: Judged) -> None:
    judged(FAMILY)
    (found,) = checking.check(only=["scaled"], targets=["sm_80"], dtypes=["fp32"])
    assert (found.faults, found.family) == ((), "toy")


def test_operators_say_what_judges_them() -> None:
    """The names of the families of regions, which take seconds to make, are in the tables of docs/kernels.md."""
    operators = [name for name in registry.modules() if name.startswith("gatecc.ops.")]
    names = {family.name for module in operators for family in registry.families_of(module)}
    assert {"linear_attention", "moe_ffn"} <= names
    assert len(operators) < len(registry.modules())


@pytest.mark.parametrize(("spoil", "code"), [({}, 0), ({"cases": {}}, 1)])
def test_the_command(judged: Judged, spoil: dict[str, Any], code: int) -> None:
    judged(replace(FAMILY, **spoil))
    words = ["kernels", "check", "--target", "sm_80", "--dtype", "fp32"]
    run = CliRunner().invoke(app, [*words, "--summary"])
    assert run.exit_code == code
    assert "1 binaries" in run.stdout
    listed = CliRunner().invoke(app, [*words, "--json"])
    found = json.loads(listed.stdout)
    assert len(found) == 2
    kept = summed(found)
    assert (kept["binaries"], kept["faults"]) == (1, code)
    assert set(kept["kernels"]) == {"toy: scaled"}
    assert kept["kernels"]["toy: scaled"]["sm_80"]["registers"] > 0
    assert "scaled" in CliRunner().invoke(app, words).stdout
    assert CliRunner().invoke(app, ["kernels", "check", "--only", "nothing"]).exit_code == 2


def test_a_device_is_judged_by_the_same_rule() -> None:
    """The interpreter stands in for it."""
    with interpreting(FAMILY.module()):
        right = judge_on_device(FAMILY, "odd", "bf16", torch.device("cpu"))
        wrong = judge_on_device(
            replace(FAMILY, cases={"odd": lambda: odd(factor=3.1)}), "odd", "fp32", torch.device("cpu")
        )
        other = judge_on_device(replace(FAMILY, run=FAMILY.reference), "odd", "fp32", torch.device("cpu"))
    assert right.faults == ()
    assert "y errs by" in wrong.faults[0]
    assert other.faults == ("no kernel ran",)
