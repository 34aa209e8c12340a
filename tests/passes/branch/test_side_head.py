"""A side head, against a head that is written down."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.side_head import SideHead
from gatecc.recipes import samples
from tests.graphs import MLP, done
from tests.recipes.checks import new_parameters, randomise, reverted


@torch.no_grad()
def test_a_second_head_reads_an_earlier_block() -> None:
    plain, inputs = samples.language()
    model: Any = gatecc.transform(plain, Branch(gatecc.Head[...].out, SideHead("block[0].out")), inputs)
    randomise(new_parameters(model, plain).values(), 0.5)
    seen = list[Any]()
    handle = plain.get_submodule("blocks.0").register_forward_hook(lambda _, args, y: seen.append(y))
    logits, side = plain(*inputs), model.head.side_head
    handle.remove()
    normed = torch.nn.functional.layer_norm(seen[0], [16], side.norm.weight, side.norm.bias)
    assert torch.allclose(model(*inputs), logits + normed @ side.out.weight.T + side.out.bias, atol=1e-5)
    with torch.enable_grad():
        reverted(model, plain, inputs)


def test_several_values_are_refused() -> None:
    with pytest.raises(SiteRefusedError, match="reads one value"):
        done(MLP, Branch(gatecc.MLP[...].out, SideHead("linear[...].in")))
