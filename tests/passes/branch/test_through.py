"""Banks of adapters through save, load, compile and revert; their recipes' cases try the decoder and export."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import gatecc
from gatecc.recipes import samples
from tests.recipes.checks import new_parameters, randomise, reverted

SITES = "linear[blocks.0.attn.q_proj]"


@pytest.mark.parametrize(("recipe", "extra"), [("lora-mixture", {"k": 2}), ("x-lora", {})])
def test_saved_loaded_compiled_and_reverted(recipe: str, extra: dict[str, Any], tmp_path: Path) -> None:
    plain, inputs = samples.language()
    built = gatecc.recipe(recipe, sites=SITES, experts=3, rank=2, **extra)
    model = gatecc.transform(plain, built, inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.3)
    with torch.no_grad():
        expected = model(*inputs)
        gatecc.save(model, tmp_path)
        assert torch.equal(gatecc.load(samples.language()[0], tmp_path)(*inputs), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        assert torch.allclose(compiled(*inputs), expected, atol=1e-5)
        assert torch.allclose(compiled(inputs[0][:, :5]), expected[:, :5], atol=1e-5)
    reverted(model, plain, inputs)
