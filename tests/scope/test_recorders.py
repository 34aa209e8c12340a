"""The hooks that transformers installs for good: they record the right tensors, and do nothing on other calls."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.scope.state import scopes
from tests.copies import learning_alone

SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIG = LlamaConfig(vocab_size=61, **SIZES)
CONFIG._attn_implementation = "eager"
IDS = torch.randint(3, 61, (2, 7), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=["gated-attention", "residual-gates", "gla", "liger"])
def recipe(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def plain() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(CONFIG).eval()


def transformed(plain: nn.Module, recipe: str, scope: Any = "auto") -> Any:
    """Not verified: the calls of the tests are the first of their kinds, and recorders may take part in each."""
    model = gatecc.transform(plain, recipe, {"input_ids": IDS, "use_cache": False}, scope=scope, verify=False)
    generator = torch.Generator().manual_seed(1)
    for name, p in model.named_parameters():
        if name not in dict(plain.named_parameters()):
            p.data = torch.randn(p.shape, generator=generator) * 0.3
    return model


@pytest.fixture(scope="module")
def made(plain: nn.Module) -> Callable[[str], Any]:
    """Copies of rewritten layers, for each recipe of one transform."""
    models: dict[str, Any] = {}

    def copied(recipe: str) -> Any:
        if recipe not in models:
            models[recipe] = transformed(plain, recipe)
        return learning_alone(models[recipe])

    return copied


@pytest.fixture(scope="module")
def by_layer(made: Callable[[str], Any], recipe: str) -> Any:
    return made(recipe)


@pytest.fixture(scope="module")
def whole(plain: nn.Module, recipe: str) -> Any:
    return transformed(plain, recipe, "model")


def hidden_states(model: Any) -> list[Tensor]:
    """By hand: the layers one after the other. None of them holds the recorders, and scopes are inside or at them."""
    inner = model.model
    states = [inner.embed_tokens(IDS)]
    place = inner.rotary_emb(states[0], torch.arange(7)[None])
    mask = torch.full((7, 7), torch.finfo(torch.float32).min).triu(1)[None, None].expand(2, 1, 7, 7)
    for layer in inner.layers:
        states.append(layer(states[-1], attention_mask=mask, position_embeddings=place))
    return [*states[:-1], inner.norm(states[-1])]


def close(a: Any, b: Any) -> bool:
    return len(a) == len(b) and all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


@pytest.mark.broad(2)
def test_hidden_states(by_layer: Any, whole: Any) -> None:
    parts = all(fqn for fqn, _, _ in scopes(by_layer))  # else its layers alone are not rewritten
    for model in (by_layer, whole):
        before = model(IDS, use_cache=False).logits
        for _ in range(2):
            found = model(IDS, use_cache=False, output_hidden_states=True)
            assert torch.equal(found.hidden_states[0], model.model.embed_tokens(IDS))
            assert torch.allclose(model.lm_head(found.hidden_states[2]), before, atol=1e-5)
            assert not parts or close(found.hidden_states, hidden_states(by_layer))
            assert torch.allclose(found.logits, before, atol=1e-5)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert len(model(IDS, use_cache=False, output_hidden_states=True).hidden_states) == 3
        kept = sum(len(s.family.entries) for _, _, s in scopes(model))
        assert torch.allclose(model(IDS, use_cache=False).logits, before, atol=1e-5)
        assert sum(len(s.family.entries) for _, _, s in scopes(model)) == kept, "idle recorders are no new kind of call"


def test_attentions(by_layer: Any, whole: Any, plain: LlamaForCausalLM, recipe: str) -> None:
    seen: list[Tensor] = []
    one = copy.deepcopy(by_layer)
    for layer in one.model.layers:
        layer.self_attn.register_forward_hook(lambda m, a, o: seen.append(o[1]))
    one(IDS, use_cache=False)
    for model in (by_layer, whole):
        found = model(IDS, use_cache=False, output_attentions=True, output_hidden_states=True)
        assert torch.allclose(model.lm_head(found.hidden_states[2]), by_layer(IDS, use_cache=False).logits, atol=1e-5)
        if recipe in ("gla", "liger"):  # there is no softmax left: nothing to show, as with transformers' own SDPA
            assert not [x for x in (*found.attentions, *seen) if x is not None]
            continue
        assert close(found.attentions, seen)
        assert close(found.hidden_states, hidden_states(by_layer))
        assert torch.allclose(found.attentions[0].sum(-1), torch.ones(2, 2, 7), atol=1e-5)
    if recipe in ("gla", "liger"):
        return
    first = cast("Any", plain)(IDS, output_attentions=True).attentions[0]
    assert torch.allclose(first, seen[0], atol=1e-5), "the first layer reads what it read"


def test_transform_of_a_model_that_has_recorders(plain: LlamaForCausalLM) -> None:
    model = copy.deepcopy(plain)
    model(IDS, output_hidden_states=True)
    assert model.model.layers[0]._forward_hooks
    gated = transformed(model, "residual-gates")
    found = gated(IDS, use_cache=False, output_hidden_states=True)
    assert close(found.hidden_states, hidden_states(gated))


def test_generate_with_hidden_states(made: Callable[[str], Any]) -> None:
    gated = made("gated-attention")
    options: dict[str, Any] = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    found = gated.generate(IDS, output_hidden_states=True, output_attentions=True, **options)
    assert torch.equal(found.sequences, gated.generate(IDS, **options).sequences)
    assert close(found.hidden_states[0], hidden_states(gated))
    assert len(found.hidden_states) == len(found.attentions) == 3


def test_compiled(made: Callable[[str], Any]) -> None:
    gated = made("residual-gates")
    call = torch.compile(gated, backend="eager")
    found = call(IDS, use_cache=False, output_hidden_states=True)
    assert close(found.hidden_states, hidden_states(gated))
    assert torch.allclose(call(IDS, use_cache=False).logits, gated(IDS, use_cache=False).logits, atol=1e-5)
