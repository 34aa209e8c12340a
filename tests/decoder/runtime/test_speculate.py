"""Drafts on models of transformers: the text is the large model's own, and the product of acceptances ends a draft."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError
from gatecc.passes.exit.rule import Acceptance, AcceptanceRule
from gatecc.recipes import samples
from gatecc.train import drafts, fit_acceptance


def mistral() -> Any:
    """A window of four tokens: what was read in vain is read again from a state before it."""
    from transformers import MistralConfig, MistralForCausalLM

    shape: Any = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": 40, "num_key_value_heads": 1, "initializer_range": 0.4, "sliding_window": 4}
    return MistralForCausalLM(MistralConfig(**shape))


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    shape: Any = {"n_positions": 64, "n_embd": 16, "n_layer": 1, "n_head": 2, "initializer_range": 0.4}
    return GPT2LMHeadModel(GPT2Config(vocab_size=40, **shape))


def near(model: Any) -> Any:
    """A draft that agrees now and then: the model with noise on its weights."""
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return other


@pytest.fixture(scope="module", params=[mistral, gpt2])
def pair(request: Any) -> tuple[Any, Any, Any, Any]:
    torch.manual_seed(0)
    target = request.param().eval()
    draft, ids = near(target), torch.randint(0, 40, (2, 8))
    return target, draft, gatecc.decoder(target, (ids,)), gatecc.decoder(draft, (ids,))


class Fixed(AcceptanceRule):
    """Every token is accepted with one probability."""

    probability = 0.8

    def score(self, logits: Tensor) -> Tensor:
        return torch.full(logits.shape[:1], self.probability)


def test_the_text_is_the_large_models_own(pair: Any) -> None:
    target, draft, large, small = pair
    rule = fit_acceptance(drafts(target, draft, [torch.randint(0, 40, (8, 16))]), steps=50)
    for length in (1, 5):
        ids = torch.randint(0, 40, (1, length))
        expected = large.generate(ids, 20)
        for found in (
            large.speculate(small, ids, 20),
            large.speculate(small, ids, 20, bound=1),
            large.speculate(small, ids, 20, rule=rule),
            large.speculate(large, ids, 20, bound=4),
        ):
            assert torch.equal(found.ids, expected)
            assert found.kept <= found.drafted
        assert found.kept == found.drafted  # a draft by the model itself
        assert found.rounds == 4  # five tokens each


@pytest.mark.parametrize(("h", "drafted"), [(1.0, 6), (0.7, 6), (0.4, 4), (0.1, 2)])
def test_a_draft_ends_where_the_product_says(pair: Any, h: float, drafted: int) -> None:
    """With p = 0.8: 1 - 0.8^(T - 1) > h first at T = 2 for 0.1, 4 for 0.4; 7 for 0.7 is beyond the bound of 6."""
    rule = Fixed(Acceptance(h))
    found = pair[2].speculate(pair[2], torch.tensor([[3, 4]]), drafted + 1, rule=rule, bound=6)
    assert (found.rounds, found.drafted) == (1, drafted)


def test_the_rule_learns_who_is_rejected() -> None:
    torch.manual_seed(0)
    logits = torch.randn(400, 6) * torch.cat([torch.full((200, 1), 5.0), torch.full((200, 1), 0.1)])
    accepted = torch.arange(400) < 200  # the sure ones
    rule = fit_acceptance(gatecc.train.Drafts(logits, accepted), "acceptance(threshold=0.7, layers=2)", steps=100)
    p = rule.score(logits).detach()
    assert float(p[:200].mean()) > 0.8
    assert float(p[200:].mean()) < 0.2
    u = rule.enter(torch.stack([x.detach() for x in _statistics(logits)], -1))
    for block in rule.blocks:
        u = u + block(u) * torch.sigmoid(block(u))
    torch.testing.assert_close(p, torch.sigmoid(rule.out(u)[:, 1] - rule.out(u)[:, 0]).detach())


def _statistics(z: Tensor) -> list[Tensor]:
    p = z.softmax(-1)
    squared = p.square() / p.square().sum(-1, keepdim=True)
    top = p.sort(-1, descending=True).values
    entropies = [-(q * q.log()).sum(-1) / torch.tensor(float(z.size(-1))).log() for q in (p, squared)]
    return [top[:, 0], entropies[0], top[:, 0] - top[:, 1], entropies[1]]


def test_bad_drafts_are_refused(pair: Any) -> None:
    with pytest.raises(ArgumentError, match="one prompt"):
        pair[2].speculate(pair[3], torch.zeros(2, 3, dtype=torch.int64), 4)
    with pytest.raises(ArgumentError, match="nothing is drafted"):
        pair[2].speculate(pair[3], torch.zeros(1, 3, dtype=torch.int64), 4, bound=0)
    with pytest.raises(ArgumentError, match="no such rule"):
        fit_acceptance(gatecc.train.Drafts(torch.randn(3, 4), torch.ones(3).bool()), "confidence")


def test_it_is_a_rule_of_exits() -> None:
    model, inputs = samples.classifier()
    exiting: Any = gatecc.transform(model, gatecc.Exit("block[0].out", rule="acceptance"), inputs)
    assert torch.equal(exiting(*inputs), model(*inputs))
    gatecc.train.exits(exiting)[0].threshold.fill_(0.4)  # p is 1/2 before it is trained: everybody leaves
    assert torch.equal(exiting(*inputs), gatecc.train.exit_logits(exiting, inputs)[0])
