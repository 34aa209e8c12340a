"""Gated associative memory, against its equation written token by token."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import GraphError, SiteRefusedError
from gatecc.passes.mix.mixers import GAM, Place
from tests.graphs import attention, done
from tests.recipes.checks import causal, gradients, new_parameters, randomise, reverted
from tests.recipes.replaced import by_hand, gap, shaken
from tests.recipes.tiny import tiny

IDS = torch.randint(0, 32, (2, 8), generator=torch.Generator().manual_seed(3))
PLACE = Place(dim=6, heads=2, kv_heads=2, key=3, value=3, scale=1.0, causal=True)


def _by_hand(m: Any, x: Tensor) -> Tensor:
    """x: (B, N, C), token by token and tap by tap."""
    taps, outs = m.conv.weight.size(-1), list[Tensor]()
    for t in range(x.size(1)):
        now = x[:, t]
        a, b = (now @ m.gate.weight.T + m.gate.bias).tensor_split(2, -1)
        local = m.conv.bias + torch.zeros_like(now)
        for i in range(min(taps, t + 1)):
            local = local + x[:, t - i] * m.conv.weight[:, 0, taps - 1 - i]
        likeness = torch.exp(now @ m.memory.T)
        recalled = (likeness / likeness.sum(-1, keepdim=True)) @ m.memory
        outs.append(a.sigmoid() * local + b.sigmoid() * recalled)
    return torch.stack(outs, 1)


@pytest.fixture(scope="module")
def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    made = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1, use_cache=False)).eval()
    randomise(made.parameters(), 0.3)
    return made


@pytest.fixture(scope="module")
def model(llama: nn.Module) -> nn.Module:
    made = gatecc.transform(llama, gatecc.recipe("gam", slots=5), (IDS,), verify=False)
    shaken(made, llama)
    return made


def test_a_llama_is_the_equation_at_every_size(llama: nn.Module, model: nn.Module) -> None:
    hand: Any = by_hand(llama, model, ["model.layers.0.self_attn"], lambda old, x, _: _by_hand(old.mixer, x))
    with torch.no_grad():
        for ids in (IDS, IDS[:1, :3]):
            assert gap(model(ids).logits, hand(ids).logits) <= 1e-5
    gradients(model, new_parameters(model, llama), model(IDS).logits)
    reverted(model, llama, (IDS,))


def test_a_layer_sees_two_tokens_back(model: nn.Module) -> None:
    """Causality, and nothing further back: the memory looks at no other token."""
    with torch.no_grad():
        before, base = IDS.clone(), model(IDS).logits
        for t in range(8):
            other = before.clone()
            other[:, t] = (other[:, t] + 1) % 32
            moved = (model(other).logits - base).abs().amax((0, 2)) > 1e-6
            assert moved.nonzero().flatten().tolist() == list(range(t, min(t + 3, 8)))


def test_the_decoder_keeps_taps(model: nn.Module) -> None:
    """State: steps are the full forward, and their state does not grow."""
    made = gatecc.decoder(model, (IDS,))
    with torch.no_grad():
        full = model(IDS).logits
    got, state = made.prefill(IDS[:, :3])
    steps = [got[:, -1]]
    for t in range(3, 8):
        got, state = made.step(IDS[:, t : t + 1], state)
        steps.append(got[:, -1])
    assert gap(torch.stack(steps, 1), full[:, 2:]) <= 1e-5
    assert all(isinstance(s, Tensor) and s.numel() == 2 * 16 * 2 for s in state["slots"])


def test_it_is_saved_and_loaded(tmp_path: Path) -> None:
    plain, x = tiny(layers=1, causal=True), torch.randn(2, 5, 16)
    model = gatecc.transform(plain, gatecc.recipe("gam", slots=5), (x,), verify=False)
    shaken(model, plain)
    assert causal(model, x, 3)
    gatecc.save(model, tmp_path)
    loaded = gatecc.load(plain, tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(x), model(x))


def test_padding_is_left_out() -> None:
    mixer = GAM(slots=4).module(PLACE)
    randomise(mixer.parameters())
    x = torch.randn(1, 7, 6)
    keep = torch.tensor([[False, False, True, True, True, True, True]])
    assert torch.allclose(mixer(x, keep)[:, 2:], _by_hand(mixer, x[:, 2:]), atol=1e-5)


def test_a_bidirectional_mask_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="gam cannot take the place"):
        done(attention(causal=False), *gatecc.recipe("gam").rewrites)


def test_the_old_projections_are_read_no_more_and_nothing_else_is_lost() -> None:
    gam = gatecc.recipe("gam", slots=4).rewrites
    result = done(attention(causal=True), *gam)
    read = {n.target for n in result.program.graph.nodes if n.op == "get_attr"}
    assert read == {f"att.mixer.{name}" for name in ("memory", "conv.weight", "conv.bias", "gate.weight", "gate.bias")}
    x = result.values["x"]
    assert torch.allclose(result.run()[0], _by_hand(result.program.module.get_submodule("att.mixer"), x), atol=1e-5)

    value_gate = gatecc.Gate(gatecc.Attention[...].v, gatecc.GateSpec("hidden", "linear", "head", "sigmoid"))
    with pytest.raises(SiteRefusedError, match="no value 'v'"):
        done(attention(causal=True), *gam, value_gate)
    with pytest.raises(GraphError, match="lost a parameter"):
        done(attention(causal=True), value_gate, *gam)
