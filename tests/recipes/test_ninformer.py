"""NiNformer, against MLP-Mixer's equations written with matrices and transposes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import SiteRefusedError
from tests.graphs import attention, done
from tests.recipes.checks import gradients, reverted
from tests.recipes.replaced import by_hand, gap, shaken, vit

IMAGE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def _norm(x: Tensor, norm: Any) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight + norm.bias


def _mlp(x: Tensor, net: Any) -> Tensor:
    return F.gelu(x @ net[0].weight.T + net[0].bias) @ net[2].weight.T + net[2].bias


def _by_hand(m: Any, x: Tensor) -> Tensor:
    y = x + _mlp(_norm(x, m.token_norm).transpose(1, 2), m.tokens).transpose(1, 2)
    y = y + _mlp(_norm(y, m.channel_norm), m.channels)
    return (x @ m.gate.weight.T + m.gate.bias) * y


def test_a_vision_transformer_is_the_equation_and_sees_order() -> None:
    plain = vit(class_token=False, global_pool="avg", pos_embed="none", dynamic_img_size=True)
    model: Any = gatecc.transform(plain, gatecc.recipe("ninformer", hidden=12), (IMAGE,), verify=False)
    new = shaken(model, plain)
    hand = by_hand(plain, model, ["blocks.0.attn"], lambda old, x, _: _by_hand(old.mixer, x))
    turned = torch.cat([IMAGE[..., 8:], IMAGE[..., :8]], -1)  # whole patches: their order changes and nothing else
    with torch.no_grad():
        for images in (IMAGE, IMAGE[:1], turned):
            assert gap(model(images), hand(images)) <= 1e-5
        assert gap(plain(turned), plain(IMAGE)) <= 1e-5
        assert gap(model(turned), model(IMAGE)) > 1e-3
    with pytest.raises(SiteRefusedError, match="another number of tokens"):
        model(IMAGE[..., :24])
    gradients(model, new, model(IMAGE))
    reverted(model, plain, (IMAGE,))
    old = [p for name, p in model.named_parameters() if "attn.qkv" in name or "attn.proj" in name]
    model(IMAGE).sum().backward()
    assert old
    assert all(p.grad is None for p in old)


def test_weights_that_lie_outside_of_the_owner_may_go_as_well() -> None:
    text = attention().replace("@att.o.weight", "@block.o.weight").replace("| att.o", "| block.o")
    result = done(text, *gatecc.recipe("ninformer", hidden=4).rewrites)
    assert not [n for n in result.program.graph.nodes if n.op == "get_attr" and "mixer" not in str(n.target)]


def test_a_causal_mask_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="ninformer cannot take the place"):
        done(attention(causal=True), *gatecc.recipe("ninformer").rewrites)


def test_padding_is_refused() -> None:
    padded = attention(mask="%keep", inputs="%keep = input  # b 1 1 n bool")
    with pytest.raises(SiteRefusedError, match=r"the mask is bidirectional\+padding"):
        done(padded, *gatecc.recipe("ninformer").rewrites)


def test_the_number_of_channels_stays() -> None:
    text = attention().replace("@att.o.weight  # 8 8", "@att.o.weight  # 6 8")
    text = text.replace("(%merged, @att.o.weight)  # b n 8", "(%merged, @att.o.weight)  # b n 6")
    with pytest.raises(SiteRefusedError, match="number of channels"):
        done(text, *gatecc.recipe("ninformer").rewrites)


def test_attention_goes() -> None:
    result = done(attention(), *gatecc.recipe("ninformer", hidden=4).rewrites)
    nodes = [str(n.target) for n in result.program.graph.nodes]
    assert not [n for n in nodes if "scaled_dot_product" in n or n.startswith("att.q")]
    mixer = result.program.module.get_submodule("att.mixer")
    assert isinstance(mixer.get_submodule("tokens.0"), nn.Linear)
    assert torch.allclose(result.run()[0], _by_hand(mixer, result.values["x"]), atol=1e-5)
