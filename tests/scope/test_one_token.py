"""One token: what a causal model makes of it is the first row of a longer call, for calls and for examples."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.engine.analyse import analyse
from gatecc.errors import MaskFormError, SiteRefusedError
from gatecc.ir.site import Attention

IDS = torch.randint(3, 41, (2, 7), generator=torch.Generator().manual_seed(0))
SHAPE: dict[str, Any] = {"vocab_size": 41, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2}


def llama(layers: int = 1) -> nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SHAPE, num_hidden_layers=layers, use_cache=False)).eval()


def logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids).logits


@pytest.mark.parametrize(
    "recipe",
    [
        gatecc.recipe("retention"),
        gatecc.recipe("gated-delta-net"),
        gatecc.recipe("liger", window=3),
        gatecc.recipe("lolcats", window=3),
        gatecc.recipe("hopfield"),
        gatecc.recipe("gam"),
        gatecc.recipe("affine-attention"),
        gatecc.recipe("gated-attention"),
    ],
    ids=str,
)
def test_a_call_of_one_token(recipe: Any) -> None:
    model = gatecc.transform(llama(), recipe, (IDS,), verify=False)
    whole = logits(model, IDS)
    for tokens in (1, 2):
        assert torch.allclose(logits(model, IDS[:, :tokens]), whole[:, :tokens], atol=1e-5)
    assert torch.allclose(logits(model, IDS[:1, :1]), whole[:1, :1], atol=1e-5)


def test_the_first_call_of_its_kind_with_two_tokens() -> None:
    """Whether keys but the last are one or more changes what torch knows of their layout: that holds for two alone."""
    model = gatecc.transform(llama(), gatecc.recipe("liger", window=3), (IDS,), verify=False)
    whole = logits(model, IDS)
    for tokens in (2, 3, 5):
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, -1, -1)
        with torch.no_grad():
            found = model(IDS[:, :tokens], attention_mask=mask).logits
        assert torch.allclose(found, whole[:, :tokens], atol=1e-5)


@pytest.mark.parametrize(("recipe", "batch"), [("gla", 1), ("liger", 2)])
def test_an_example_of_one_token(recipe: str, batch: int) -> None:
    torch.manual_seed(1)
    short = gatecc.transform(llama(), recipe, (IDS[:batch, :1],))
    torch.manual_seed(1)
    long = gatecc.transform(llama(), recipe, (IDS,))
    assert short.state_dict().keys() == long.state_dict().keys()
    short.load_state_dict(long.state_dict())
    assert torch.allclose(logits(short, IDS), logits(long, IDS), atol=1e-6)
    mask = torch.ones(2, 1, 7, 7, dtype=torch.bool)
    with pytest.raises(MaskFormError):
        short(IDS, attention_mask=mask)


class Spelled(nn.Module):
    """Attention whose causal mask is made of positions: on one token nothing of it is to be seen."""

    def __init__(self, causal: bool, longest: int = 99) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.causal, self.longest = causal, longest

    def forward(self, x: Tensor) -> Tensor:
        if x.size(1) > self.longest:
            raise ValueError("too long")
        q, k, v = (f(x).unflatten(-1, (2, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT * 0.5
        if self.causal:
            scores = scores.masked_fill(torch.ones(x.size(1), x.size(1), dtype=torch.bool).triu(1), -torch.inf)
        return self.o((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def masks(model: nn.Module) -> set[str]:
    return {s.mask.kind for s in analyse(model, (torch.randn(2, 1, 8),), {}).sites if isinstance(s, Attention)}


def test_a_longer_example_tells_the_direction() -> None:
    assert masks(Spelled(causal=True)) == {"causal"}
    assert masks(Spelled(causal=False)) == {"bidirectional"}


def test_what_no_example_tells_is_refused() -> None:
    model = Spelled(causal=True, longest=1)
    assert masks(model) == {"unknown"}
    with pytest.raises(SiteRefusedError, match="one token"):
        gatecc.transform(model, "gla", (torch.randn(2, 1, 8),))
