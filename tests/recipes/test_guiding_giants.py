"""Guiding giants on real models: the equation by hand, with hooks on the layers of the model of before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.errors import ArgumentError, GateccError, SiteRefusedError
from gatecc.passes.branch.steer import controllers
from gatecc.train.steering import controller_loss

IDS = {"input_ids": torch.arange(24).view(3, 8)}
R = torch.randn(32, generator=torch.Generator().manual_seed(0))
SMALL: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
OPTIONS: Any = {"direction": tuple(R.tolist()), "size": 8, "layers": 2}


def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=40, use_cache=False)).eval()


def neox() -> Any:
    torch.manual_seed(0)
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, vocab_size=40, use_cache=False, max_position_embeddings=32)).eval()


FAMILIES: dict[str, Any] = {"llama": (llama, lambda m: m.model.layers), "neox": (neox, lambda m: m.gpt_neox.layers)}


def noised(model: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in controllers(model)[0].parameters():
            p.normal_(std=0.3)
    return model


def first(value: Any) -> torch.Tensor:
    return value[0] if isinstance(value, tuple) else value


@torch.no_grad()
def by_hand(model: Any, layers: Any, controller: Any, tokens: str, alpha: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits, and c at the last token."""
    states: list[torch.Tensor] = []
    hooks = [layer.register_forward_hook(lambda _, a, out: states.append(first(out).clone())) for layer in layers]
    model(**IDS)
    for hook in hooks:
        hook.remove()
    c = torch.cat(states[-2:], -1)
    hidden = F.relu(c @ controller.hidden.weight.T + controller.hidden.bias)
    y = hidden @ controller.out.weight.T + controller.out.bias
    s, z = y[..., 0], y[..., 1:]

    def steer(number: int) -> Any:
        def hook(_: Any, args: Any, out: Any) -> Any:
            h = first(out).clone()
            added = (s * torch.sigmoid(z[..., number]) * alpha)[..., None] * R
            h[:, -1] += added[:, -1]
            if tokens == "each":
                h[:, :-1] += added[:, :-1]
            return (h, *out[1:]) if isinstance(out, tuple) else h

        return hook

    hooks = [layer.register_forward_hook(steer(number)) for number, layer in enumerate(layers)]
    logits = model(**IDS).logits
    for hook in hooks:
        hook.remove()
    return logits, c[:, -1]


@pytest.mark.broad(2)
@pytest.mark.parametrize("tokens", ["last", "each"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_equation(family: str, tokens: str) -> None:
    make, layers = FAMILIES[family]
    base = make()
    made = gatecc.transform(base, gatecc.recipe("guiding-giants", tokens=tokens, **OPTIONS), IDS)
    with torch.no_grad():
        assert torch.allclose(made(**IDS).logits, base(**IDS).logits, atol=1e-6)  # s starts at 0
        expected, c = by_hand(base, layers(base), controllers(noised(made))[0], tokens, 4.0)
        assert torch.allclose(made(**IDS).logits, expected, atol=1e-5)
    assert not torch.allclose(expected, base(**IDS).logits, atol=1e-2)
    assert torch.equal(gatecc.train.controller_inputs(made, [IDS]), c)


def test_without_alpha_it_is_the_base_bitwise_whatever_the_controller_says() -> None:
    base = llama()
    made = noised(gatecc.transform(base, gatecc.recipe("guiding-giants", alpha=0.0, **OPTIONS), IDS))
    with torch.no_grad():
        assert torch.equal(made(**IDS).logits, base(**IDS).logits)


def test_the_last_token_alone_is_no_function_of_tokens() -> None:
    made = noised(gatecc.transform(llama(), gatecc.recipe("guiding-giants", **OPTIONS), IDS))
    with pytest.raises(GateccError, match="no decode step can be derived"):
        gatecc.decoder(made, IDS)


def test_only_the_controller_is_trained_on_what_was_cached() -> None:
    base = llama()
    made = gatecc.transform(base, gatecc.recipe("guiding-giants", **OPTIONS), IDS)
    frozen = {name: p.clone() for name, p in made.named_parameters() if "controller" not in name}
    c, labels = torch.randn(64, 64), torch.arange(64) % 2
    c[:, 0] += 3 * labels
    controller = controllers(made)[0]
    s, z = controller.scores(c)
    w = torch.sigmoid(z)
    bce = -(labels * F.logsigmoid(s) + (1 - labels) * F.logsigmoid(-s)).mean()
    assert torch.allclose(
        controller_loss(controller, c, labels), bce + 0.1 * ((w - 0.5).abs().mean() + 0.01 * w.mean())
    )
    losses = gatecc.train.fit_controller(made, c, labels, steps=150, lr=1e-2)
    assert losses[-1] < 0.3 * losses[0]
    right = (controller.scores(c)[0] > 0) == labels.bool()
    assert right.float().mean() > 0.95
    assert all(torch.equal(p, made.get_parameter(name)) for name, p in frozen.items())
    with pytest.raises(ArgumentError, match="one label for each"):
        gatecc.train.fit_controller(made, c, labels[:3])
    with pytest.raises(ArgumentError, match="no controller"):
        gatecc.train.controller_inputs(base, [IDS])


def test_bad_input_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="does not fit the hidden states"):
        gatecc.transform(llama(), gatecc.recipe("guiding-giants", direction=(1.0, 2.0)), IDS)
    for wrong in ({"tokens": "some"}, {"layers": 0}, {"direction": ()}):
        with pytest.raises(ArgumentError, match="steers nothing"):
            gatecc.recipe("guiding-giants", **{**OPTIONS, **wrong})
