"""G2GNet on real models: the mask, its gradient, constant density while pairs are pruned and regrown, and what is
skipped."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ops.group_linear import masked
from gatecc.passes.reweight.groups import GroupMask

IDS = {"input_ids": torch.arange(80).view(2, 40) % 40}


def llama() -> nn.Module:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=4,
        vocab_size=40,
        use_cache=False,
    )
    return LlamaForCausalLM(config).eval()


def vit() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=4, depth=1, embed_dim=64, num_heads=4
    ).eval()


FAMILIES: dict[str, Any] = {"llama": (llama, IDS), "vit": (vit, (torch.randn(2, 3, 32, 32),))}


def run(model: nn.Module, inputs: Any) -> torch.Tensor:
    return model(**inputs).logits if isinstance(inputs, dict) else model(*inputs)


def places(mask: torch.Tensor) -> set[int]:
    return set(mask.flatten().nonzero().flatten().tolist())


def masks(model: nn.Module) -> dict[str, GroupMask]:
    return {name: module for name, module in model.named_modules() if isinstance(module, GroupMask)}


@pytest.mark.parametrize("family", FAMILIES)
def test_masked_weights_by_hand_and_skipped(family: str) -> None:
    make, inputs = FAMILIES[family]
    base = make()
    whole = gatecc.transform(base, gatecc.recipe("g2gnet", density=1.0), inputs)
    with torch.no_grad():
        assert torch.equal(run(whole, inputs), run(base, inputs))
    made = gatecc.transform(base, gatecc.recipe("g2gnet", groups=4, density=0.25), inputs)
    by_hand = make()
    for name, module in masks(made).items():
        assert int(module.mask.sum()) == 4
        weight = by_hand.get_parameter(name.replace("groups", "weight"))
        rows, columns = weight.size(0) // 4, weight.size(1) // 4
        strength = F.avg_pool2d(weight.detach().abs()[None], (rows, columns))[0]
        assert set(strength.flatten().topk(4).indices.tolist()) == set(
            module.mask.flatten().nonzero().flatten().tolist()
        )
        weight.data.mul_(module.mask.repeat_interleave(rows, 0).repeat_interleave(columns, 1))
    expected = run(by_hand, inputs)
    assert torch.allclose(run(made, inputs), expected, atol=1e-5)  # with gradients: masked
    with torch.no_grad():
        assert torch.allclose(run(made, inputs), expected, atol=1e-5)  # without: skipped
    found = gatecc.cost(made, inputs, rounds=0)
    own = sum(p.numel() for n, p in base.named_parameters() if f"{n.removesuffix('weight')}groups" in masks(made))
    tokens = 65 if family == "vit" else 40
    assert found.full.flops - found.ran.flops == 0.75 * 2 * own * tokens
    assert {row.kind for row in found.taken} == {"group"}
    reverted = gatecc.revert(made).state_dict()
    assert all(torch.equal(tensor, reverted[name]) for name, tensor in base.state_dict().items())


def test_pruned_and_regrown_at_constant_density() -> None:
    model: Any = gatecc.transform(llama(), gatecc.recipe("g2gnet", groups=4, density=0.5, every=2, share=0.25), IDS)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    name, module = next(iter(masks(model).items()))
    linear = model.get_submodule(name.removesuffix(".groups"))
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    for step in range(4):
        handle = linear.register_forward_hook(lambda _, args, out: seen.append((args[0].detach(), out.detach())))
        model.train()(**IDS, labels=IDS["input_ids"]).loss.backward()
        handle.remove()
        elements = module.mask.repeat_interleave(32, 0).repeat_interleave(16, 1)
        assert not linear.weight.grad[~elements].any()
        assert linear.weight.grad[elements].all()
        before, weights = module.mask.clone(), linear.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        gatecc.train.routing.step(model)
        assert [int(m.mask.sum()) for m in masks(model).values()] == [8, 8, 8]
        gone, grown = before & ~module.mask, module.mask & ~before
        assert int(gone.sum()) == int(grown.sum()) == (2 if step % 2 else 0)
        if step == 1 and len(seen) == 2:
            x, y = (
                torch.cat([pair[i].reshape(-1, 4, pair[i].size(-1) // 4).mean(-1) for pair in seen]) for i in (0, 1)
            )
            corr = torch.corrcoef(torch.cat([y, x], 1).T)[:4, 4:].abs().masked_fill(before, -1)
            assert set(corr.flatten().topk(2).indices.tolist()) == places(grown)
            strength = F.avg_pool2d(weights.abs()[None], (32, 16))[0].masked_fill(~before, 9)
            weakest = strength.flatten().topk(2, largest=False).indices
            assert set(weakest.tolist()) == places(gone)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 1 << 12), st.sampled_from([(1, 1), (2, 3), (3, 2), (4, 4)]), st.booleans(), st.integers(1, 300))
def test_the_operator_is_the_masked_product(seed: int, pairs: tuple[int, int], bias: bool, tokens: int) -> None:
    torch.manual_seed(seed)
    G, H = pairs
    x, weight, mask = torch.randn(tokens, H * 16), torch.randn(G * 24, H * 16), torch.rand(G, H) > 0.5
    b = torch.randn(G * 24) if bias else None
    expected = masked(x.double(), weight.double(), mask, None if b is None else b.double())
    assert torch.allclose(torch.ops.gatecc.group_linear(x, weight, mask, b).double(), expected, atol=1e-4)
    cut = torch.ops.gatecc.group_linear(x.unsqueeze(0).bfloat16(), weight.bfloat16(), mask, None)
    assert cut.shape == (1, tokens, G * 24)
    assert cut.dtype == torch.bfloat16


def test_bad_input_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="groups of one size"):
        gatecc.transform(llama(), gatecc.recipe("g2gnet", groups=7), IDS)
    for wrong in ({"groups": 0}, {"density": 0.0}, {"density": 0.001}, {"density": 1.5}, {"share": 0.0}, {"every": -1}):
        with pytest.raises(ArgumentError, match="out of range"):
            gatecc.recipe("g2gnet", **wrong)
    made = gatecc.transform(llama(), gatecc.recipe("g2gnet", every=1), IDS)
    gatecc.train.routing.step(made)  # nothing was seen in training yet: nothing changes
    assert all(int(m.mask.sum()) == 16 for m in masks(made).values())
