"""Affine-scaled attention."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import gatecc
from tests.recipes.checks import agree, case, causal, cost, new_parameters, randomise, reverted, zoo
from tests.recipes.tiny import HEAD, HEADS, KV_HEADS, Attention, Tiny, tiny

X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(4))


def _scaled_weights(model: nn.Module, plain: Tiny) -> Tiny:
    """The definition: the softmax weights themselves become alpha * a + beta on the keys that a query sees."""

    class Scaled(Attention):
        def forward(self, x: Tensor) -> Tensor:
            self.gates: list[Tensor] = [
                act(nn.functional.linear(x, gate.get_parameter("weight"), gate.get_parameter("bias")))
                .transpose(1, 2)
                .unsqueeze(-1)
                for name, act in (("alpha", lambda z: 2 * torch.sigmoid(z)), ("beta", torch.tanh))
                for gate in [model.get_submodule(f"blocks.{self.layer}.attn.{name}")]
            ]
            return super().forward(x)

        def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            seen = torch.ones(q.size(2), k.size(2))
            seen = seen.tril() if self.causal else seen
            a = (q @ k.mT * HEAD**-0.5).masked_fill(seen == 0, float("-inf")).softmax(-1)
            alpha, beta = self.gates
            assert torch.allclose(
                (alpha * a + beta * seen).sum(-1, keepdim=True), alpha + beta * seen.sum(-1)[:, None], atol=1e-5
            )
            return (alpha * a + beta * seen) @ v

    other = copy.deepcopy(plain)
    for block in other.blocks:
        block.get_submodule("attn").__class__ = Scaled
    return other


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("fused", [True, False])
def test_both_forms_agree(is_causal: bool, fused: bool) -> None:
    plain = tiny(causal=is_causal, fused=fused)
    model = gatecc.transform(plain, "affine-attention", (X,), verify=False)
    assert agree(model, plain, X) == 0
    randomise(new_parameters(model, plain).values())
    assert agree(model, plain, X) > 1e-3
    assert agree(model, _scaled_weights(model, plain), X) <= 2e-6
    assert agree(model, _scaled_weights(model, plain), torch.randn(3, 11, 16)) <= 2e-6
    assert causal(model, X, 4) is is_causal
    reverted(model, plain, (X,))


def test_the_cost_is_two_gates_and_no_second_attention() -> None:
    model = gatecc.transform(tiny(causal=True), "affine-attention", (X,), verify=False)
    gates = 2 * 2 * (2 * 2 * 7 * 16 * HEADS)
    assert gates <= cost(model) < gates + 2 * 2 * 7 * HEADS * HEAD * 8
    assert sum(p.numel() for p in new_parameters(model, tiny()).values()) == 2 * 2 * (16 * HEADS + HEADS)
    assert KV_HEADS < HEADS, "the values of a group are summed once and repeated"


@pytest.mark.parametrize(
    ("name", "export"),
    [("hf/llama-sdpa", True), ("hf/vit-eager", False)],
)
def test_real_models(name: str, export: bool) -> None:
    zoo(name, "affine-attention", export=export)


def test_a_sliding_window_sums_its_window() -> None:
    from gatecc.passes.branch.prefix_sum import key_sum

    v = torch.randn(2, 3, 9, 4)
    expected = torch.stack([v[:, :, max(0, i - 3) : i + 1].sum(2) for i in range(9)], 2)
    assert torch.allclose(key_sum(v, 2, True, 4), expected, atol=1e-6)
    assert torch.allclose(key_sum(v, 2, True, 99), v.cumsum(2))


def test_padding_keys_are_not_in_the_sum() -> None:
    known = case("hf/bert_padded-sdpa")
    model = gatecc.transform(known.model, "affine-attention", known.inputs, verify=False)
    randomise(new_parameters(model, known.model).values(), 0.1)
    mask = known.kwargs["attention_mask"]
    row = int((mask.sum(1) < mask.size(1)).nonzero()[0])
    short = {name: x[row : row + 1, : int(mask[row].sum())] for name, x in known.kwargs.items()}
    with torch.no_grad():
        padded, alone = model(**known.kwargs)[0][row], model(**short)[0][0]
    assert torch.allclose(padded[: len(alone)], alone, atol=1e-5)
