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


@pytest.mark.parametrize("recipe", [{"name": "lora-mixture", "k": 2}, {"name": "x-lora"}], ids=str)
def test_saved_loaded_compiled_and_reverted(recipe: dict[str, Any], tmp_path: Path) -> None:
    plain, inputs = samples.language()
    options = {"sites": SITES, "experts": 3, "rank": 2} | recipe
    model = gatecc.transform(plain, gatecc.recipe(options.pop("name"), **options), inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.3)
    with torch.no_grad():
        expected = model(*inputs)
        gatecc.save(model, tmp_path)
        assert torch.equal(gatecc.load(samples.language()[0], tmp_path)(*inputs), expected)
        compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        assert torch.allclose(compiled(*inputs), expected, atol=1e-5)
        assert torch.allclose(compiled(inputs[0][:, :5]), expected[:, :5], atol=1e-5)
    reverted(model, plain, inputs)
