"""The registry: every recipe builds, is data, and says where it comes from."""

from __future__ import annotations

import json
from typing import Any

import pytest

import gatecc
from gatecc.errors import ArgumentError, UnknownRecipeError
from gatecc.ir.rewrite import rewrite_from_json
from gatecc.recipes import resolve


@pytest.mark.parametrize("info", gatecc.recipes(), ids=lambda info: info.name)
def test_every_recipe_is_data_with_a_source(info: Any) -> None:
    recipe = gatecc.recipe(info.name, **info.cases[0].options)  # some options have no default
    assert recipe.rewrites
    assert recipe.citation
    assert info.summary.endswith(".")
    assert len(info.doc) > 200
    for rewrite in recipe.rewrites:
        assert rewrite_from_json(json.loads(json.dumps(rewrite.to_json()))) == rewrite
        rewrite.contract()


def test_wrong_names_and_options() -> None:
    with pytest.raises(UnknownRecipeError, match="did you mean gated-attention"):
        gatecc.recipe("gated-atention")
    with pytest.raises(ArgumentError, match="no option gate"):
        gatecc.recipe("gated-attention", gate=1)
    with pytest.raises(ArgumentError, match="needs the option context"):
        gatecc.recipe("context-gates")
    with pytest.raises(ArgumentError, match="not a recipe"):
        resolve([])


def test_an_option_of_few_values_offers_those() -> None:
    with pytest.raises(ArgumentError, match=r"(?s)gated-attention takes no granularity='foo'.*'head' or 'element'$"):
        gatecc.recipe("gated-attention", granularity="foo")
    with pytest.raises(ArgumentError, match="join"):
        gatecc.recipe("residual-gates", join="none")
