"""Models and recipes of all kinds as ONNX, with weights that matter: right, or refused by operator and line.

By default a few; GATECC_ZOO=all runs everything that ``benchmarks/onnx_exports.py`` does.
"""

from __future__ import annotations

import os
from typing import Any

import pytest

import gatecc
from tests.acceptance import onnx_exports, onnx_models

pytest.importorskip("onnxruntime")
ALL = os.getenv("GATECC_ZOO") == "all"
KINDS = onnx_models.KINDS
MODELS = tuple(KINDS) if ALL else ("hf/falcon-sdpa", "hand/sdpa_gqa", "torch/mha_cross")
CASES = [(info, case) for info in gatecc.recipes() for case in info.cases if ALL or info.name == "omnibind"]
RECIPES = [info.name for info in gatecc.recipes()] if ALL else ["retention", "pgn", "vig"]


def test_enough_models_of_every_kind_and_every_recipe() -> None:
    assert len([name for name, kind in KINDS.items() if kind != "part"]) >= 80
    assert set(KINDS.values()) == {"decoder", "encoder", "experts", "seq2seq", "audio", "vision", "part"}
    assert set(onnx_exports.RECIPES) <= {info.name for info in gatecc.recipes()}


@pytest.mark.parametrize("name", ["wav2vec2", "regnet"])
def test_kinds_of_which_no_other_test_here_exports_one(name: str) -> None:
    """Sound, and images without attention. Decoders, encoders, experts and pairs of both are in tests/export."""
    result = onnx_exports.exported(*onnx_exports.host(name))
    assert result.became == "written", result.said
    assert result.batches == (1, 3)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_and_its_gated_form(name: str) -> None:
    results = dict(onnx_exports.plain_and_gated(name))
    assert {name: result.said for name, result in results.items() if not result.right} == {}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_with_random_new_weights(name: str) -> None:
    result = onnx_exports.of_recipe(name)
    assert result.right, result.said


@pytest.mark.parametrize(("info", "case"), CASES, ids=[info.name for info, _ in CASES])
def test_a_recipe_on_its_own_case(info: Any, case: Any) -> None:
    result = onnx_exports.of_case(info, case)
    assert result.became == "written", result.said
    assert 3 in result.batches
