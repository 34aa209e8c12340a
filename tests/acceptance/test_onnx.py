"""Models and recipes of all kinds as ONNX, with weights that matter: right, or refused by operator and line.

By default a few; GATECC_ZOO=all runs everything that ``benchmarks/onnx_exports.py`` does.
"""

from __future__ import annotations

import os

import pytest

import gatecc
from tests.acceptance import onnx_exports

pytest.importorskip("onnxruntime")
ALL = os.getenv("GATECC_ZOO") == "all"
MODELS = onnx_exports.MODELS if ALL else ("hf/falcon-sdpa", "hand/sdpa_gqa", "torch/mha_cross")
RECIPES = [info.name for info in gatecc.recipes()] if ALL else ["retention", "pgn", "vig"]


def test_enough_models_and_every_recipe() -> None:
    assert len(onnx_exports.MODELS) >= 50
    assert set(onnx_exports.RECIPES) <= {info.name for info in gatecc.recipes()}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_gated_form(name: str) -> None:
    results = dict(onnx_exports.plain_and_gated(name))
    assert {name: result.said for name, result in results.items() if not result.right} == {}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_random_new_weights(name: str) -> None:
    result = onnx_exports.of_recipe(name)
    assert result.right, result.said
