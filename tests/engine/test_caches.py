"""Caches: whether they can be served is tried; what is switched off is so everywhere, and put back exactly."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.capture.adapters import switch_caches
from gatecc.engine.caches import caches_off, caches_on
from gatecc.errors import CallNotCapturedError

V, D, H = 31, 16, 4


class DynamicCache:
    """Keys and values so far, named and placed as a cache of transformers."""

    __module__ = "transformers.cache_utils"

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values, of which these are the last."""
        if self.held:
            k, v = torch.cat([self.held[0], k], 2), torch.cat([self.held[1], v], 2)
        self.held = [k, v]
        return k, v


class Attention(nn.Module):
    """Causal attention; ``product`` is how weights and values meet in a call with a cache."""

    def __init__(self, product: str) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(D, D) for _ in range(4))
        self.product = product

    def forward(self, x: Tensor, cache: Any = None) -> Tensor:
        """x: (B, N, D)"""
        q, k, v = (y(x).unflatten(-1, (H, -1)).transpose(1, 2) for y in (self.q, self.k, self.v))
        if cache is not None:
            k, v = cache.update(k, v)
        past = k.shape[2] - q.shape[2]
        seen = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(past)
        weights = F.softmax((q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~seen, -torch.inf), -1)
        if cache is None or self.product == "matmul":
            y = weights @ v
        elif self.product == "cut":
            y = torch.matmul(F.pad(weights, (0, 1))[..., :-1].contiguous() if self.training else weights[..., :], v)
        else:
            y = torch.einsum("bhnm,bhmd->bhnd", weights, v)
        return self.o(y.transpose(1, 2).flatten(2))


class LM(nn.Module):
    """One layer that is called as models of transformers are."""

    def __init__(self, product: str) -> None:
        super().__init__()
        inner = SimpleNamespace(use_cache=True, to_dict=dict)
        self.config = SimpleNamespace(use_cache=True, to_dict=dict, text_config=inner)
        self.embed, self.attn, self.head = nn.Embedding(V, D), Attention(product), nn.Linear(D, V)

    def forward(self, input_ids: Tensor, use_cache: bool | None = None, cache: Any = None) -> dict[str, Any]:
        """input_ids: (B, N) -> logits: (B, N, V)"""
        use_cache = self.config.use_cache if use_cache is None else use_cache
        held = (cache or DynamicCache()) if use_cache else None
        x = self.embed(input_ids)
        logits = self.head(x + self.attn(x, held))
        return {"logits": logits} if held is None else {"logits": logits, "cache": held}


IDS = torch.randint(V, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("product", ["matmul", "cut"])
def test_a_cache_that_works_stays(product: str) -> None:
    torch.manual_seed(0)
    gated: Any = gatecc.transform(LM(product).eval(), "gated-attention", (IDS,))
    nn.init.normal_(gated.attn.gate.weight)
    assert gated.config.use_cache
    with torch.no_grad():
        want = gated(IDS, use_cache=False)["logits"]
        first = gated(IDS[:, :-1])
        last = gated(IDS[:, -1:], cache=first["cache"])
    torch.testing.assert_close(last["logits"], want[:, -1:])


def test_a_cache_that_does_not_work_is_switched_off_and_says_why() -> None:
    torch.manual_seed(0)
    model = LM("einsum").eval()  # no call on the Python path shows where weights and values meet
    gated: Any = gatecc.transform(model, "gated-attention", (IDS,))
    assert (gated.config.use_cache, gated.config.text_config.use_cache) == (False, False)
    assert (model.config.use_cache, model.config.text_config.use_cache) == (True, True)
    (note,) = (n for n in gatecc.last_report(gated).notes if "use_cache" in n)
    assert "a call with one was tried" in note
    torch.testing.assert_close(gated(IDS)["logits"], model(IDS, use_cache=False)["logits"])
    with pytest.raises(CallNotCapturedError, match="was tried"):
        gated(IDS, use_cache=True)
    back: Any = gatecc.revert(gated)
    assert (back.config.use_cache, back.config.text_config.use_cache) == (True, True)


def test_settings_come_back_as_they_were() -> None:
    model = LM("matmul")
    model.config.use_cache = 1
    model.config.text_config.use_cache = False
    settings = caches_off(model)
    assert model.config.use_cache is False
    assert [value for _, value in settings] == [1]
    assert not switch_caches(model)
    caches_on(settings)
    assert (model.config.use_cache, model.config.text_config.use_cache) == (1, False)
