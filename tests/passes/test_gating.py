"""Gates on what routes experts: the logits of a router and the weights of those that were chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc import MLP, GateSpec
from gatecc.errors import SiteRefusedError

pytest.importorskip("transformers")

from tests.ir.match.test_routing import K, X, block


def gated(implementation: str, site: Any) -> tuple[Any, nn.Parameter]:
    """A mixture whose gate is one number per expert, and these numbers."""
    made: Any = gatecc.transform(
        block("mixtral", implementation), gatecc.Gate(site, GateSpec("param", "none", "expert", "linear")), (X,)
    )
    (name,) = (name for row in gatecc.last_report(made).rewrites for name in row.new_parameters)
    return made, made.get_parameter(name)


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
def test_a_gate_on_the_router_scales_its_rows(implementation: str) -> None:
    made, scale = gated(implementation, MLP[...].router)
    plain = block("mixtral", implementation)
    with torch.no_grad():
        assert torch.allclose(made(X), plain(X), atol=1e-6)
        scales = torch.tensor([2.0, 0.5, -1.0, 3.0])
        scale.copy_(scales.view_as(scale))
        assert not torch.allclose(made(X), plain(X), atol=1e-2)
        plain.gate.weight.mul_(scales[:, None])
        assert torch.allclose(made(X), plain(X), atol=1e-5)
    assert made.experts.config._experts_implementation == implementation


def test_a_gate_on_the_weights_is_one_for_each_that_was_chosen() -> None:
    made, scale = gated("grouped_mm", MLP[...].weights)
    plain = block("mixtral", "grouped_mm")
    assert scale.numel() == K
    with torch.no_grad():
        assert torch.allclose(made(X), plain(X), atol=1e-6)
        scale.fill_(0.5)
        assert torch.allclose(made(X), plain(X) / 2, atol=1e-6)


def test_experts_are_not_gated_by_their_numbers() -> None:
    with pytest.raises(SiteRefusedError, match="which, not how much"):
        gatecc.transform(block("mixtral", "grouped_mm"), gatecc.Gate(MLP[...].indices, GateSpec("in")), (X,))


def test_a_dense_layer_has_no_router() -> None:
    dense = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
    with pytest.raises(SiteRefusedError, match="dense"):
        gatecc.transform(dense, gatecc.Gate(MLP[...].router, GateSpec("in")), (torch.randn(2, 3, 4),))
