"""A matrix as the sum of its singular parts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.passes.svd_split import SvdSplit
from gatecc.recipes import samples
from tests.graphs import MLP, done
from tests.recipes.checks import new_parameters, randomise, reverted


@torch.no_grad()
def test_parts_are_weighed_by_the_condition() -> None:
    plain, inputs = samples.conditioned()
    args, kwargs = inputs
    recipe = gatecc.recipe("divcontrol", condition="text", sites="linear[blocks.0.mlp.up]", parts=3)
    model: Any = gatecc.transform(plain, recipe, inputs)
    assert float((model(*args, **kwargs) - plain(*args, **kwargs)).abs().max()) <= 1e-5  # all gates are 1
    up = model.blocks[0].mlp.up
    assert up._parameters["weight"] is None
    weight, bias = plain.get_parameter("blocks.0.mlp.up.weight"), plain.get_parameter("blocks.0.mlp.up.bias")
    assert torch.allclose((up.svd.b.T @ up.svd.a), weight, atol=1e-5)  # the full rank
    randomise([up.gate.weight, up.gate.bias], 0.5)
    g = 3 * (kwargs["text"] @ up.gate.weight.T + up.gate.bias).softmax(-1)  # (2, 3)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    seen: list[torch.Tensor] = []
    x = torch.randn(2, 5, 16)
    for sample, gates in zip(x, g, strict=True):
        scale = torch.cat([torch.ones(10), *(gates[j].repeat(2) for j in range(3))])  # of 16: 10 shared, 3 parts of 2
        seen.append(sample @ ((u * s * scale) @ v).T.float() + bias)
    assert torch.allclose(up.svd(x, g.unsqueeze(1)), torch.stack(seen), atol=1e-4)
    reverted(model, plain, args, kwargs)


@torch.no_grad()
def test_the_whole_model_follows_the_gates() -> None:
    plain, (args, kwargs) = samples.conditioned()
    recipe = gatecc.recipe("divcontrol", condition="text", sites="linear[blocks.0.mlp.up]", parts=2, init="zero")
    model = gatecc.transform(plain, recipe, (args, kwargs), verify=False)
    before = model(*args, **kwargs)
    randomise([p for name, p in new_parameters(model, plain).items() if ".gate." in name])
    assert float((model(*args, **kwargs) - before).abs().max()) > 1e-3


def test_more_parts_than_singular_values_are_refused() -> None:
    gate = GateSpec("in", "linear", "expert", "softmax", init="zero")
    with pytest.raises(SiteRefusedError, match="too few singular values"):
        done(MLP, SvdSplit(gatecc.Linear[...].out, gate, parts=9))
    with pytest.raises(SiteRefusedError, match="only a matrix of its own"):
        done(MLP, SvdSplit(gatecc.MLP[...].out, gate, parts=2))
