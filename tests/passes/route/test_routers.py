"""Route with routers of many kinds: decoded step by step, or refused where tokens are compared; padding by its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import DecoderError
from gatecc.ir.router import RouterSpec
from gatecc.passes.route.copies import Copies
from gatecc.passes.route.route import Route
from gatecc.recipes import samples
from gatecc.train import routing


def routed(**options: Any) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model, (ids,) = samples.language()
    made = gatecc.transform(
        model, Route("mlp[0]", RouterSpec(init="random(0.5)", **options), Copies(4)), (ids,), verify=False
    )
    with torch.no_grad():
        for name, p in made.named_parameters():
            if "experts" in name:
                p.add_(torch.randn_like(p) * 0.2)
    return made, ids


def test_groups_and_biases_are_decoded() -> None:
    model, ids = routed(choice="sigmoid_topk(2, groups=2, limit=1, scale=2.5, bias=True)")
    made = gatecc.decoder(model, (ids,))
    logits, state = made.prefill(ids[:, :5])
    for t in range(5, ids.size(1)):
        logits, state = made.step(ids[:, t], state)
    torch.testing.assert_close(logits.view(2, -1), model(ids)[:, -1], rtol=1e-5, atol=1e-5)


def test_experts_that_choose_tokens_are_not_decoded() -> None:
    model, ids = routed(choice="expert_choice(capacity=2.0)")
    assert any("not causal" in note for note in gatecc.last_report(model).notes)
    with pytest.raises(DecoderError):
        gatecc.decoder(model, (ids,))


class Padded(nn.Module):
    """x: (B, N, 8), attention_mask: (B, N)"""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x))) * attention_mask.unsqueeze(-1)


def test_padding_is_an_input_of_the_model() -> None:
    x, mask = torch.randn(2, 6, 8), torch.tensor([[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])
    spec = RouterSpec(balance="aux+bias", mask="attention_mask")
    model = gatecc.transform(Padded().eval(), Route("mlp[...]", spec, Copies(4)), (x, mask), verify=False).train()
    model(x, mask)
    (found,) = gatecc.routing(model).values()
    assert found.tokens == 10
    one = next(routing.routers(model))[1]
    real = x.flatten(0, 1)[mask.flatten().bool()]
    chosen = (real @ one.get_parameter("weight").T).topk(2).indices
    assert torch.equal(one.counts, torch.bincount(chosen.flatten(), minlength=4).float())
