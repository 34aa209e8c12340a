"""SeerAttention: pooled gates choose blocks; what they do not choose is masked with gradients and skipped without."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ops.block_gate import block_choice, block_logits
from gatecc.passes.attention_edit.attention_edit import AttentionEdit
from gatecc.passes.attention_edit.blocks import Blocks
from gatecc.train import Tune, heal, routing
from tests.graphs import attention, done
from tests.recipes.checks import case, new_parameters, reverted


def llama(implementation: str = "sdpa", **options: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": implementation}
    return LlamaForCausalLM(LlamaConfig(**shape, **options)).eval()


@pytest.mark.parametrize("causal", [True, False])
def test_the_equation(causal: bool) -> None:
    result = done(attention(causal), AttentionEdit("attention[...]", Blocks(1, 4, 0.5), label="gate"))
    module, v = result.program.module, result.values
    gate: Any = module.get_submodule("att.gate")
    logits = block_logits(v["qh"], v["kh"], gate.query, gate.key, None, 1)
    blocks = block_choice(logits, torch.tensor(0.5), None, 1, True, causal)
    seen = blocks.tril() if causal else blocks
    scores = v["qh"] @ v["kr"].mT / 2**0.5
    heads = scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v["vr"]
    expected = heads.transpose(1, 2).flatten(2) @ module.get_parameter("att.o.weight").T
    assert not torch.equal(seen, torch.ones_like(seen).tril() if causal else torch.ones_like(seen))
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_odd_lengths_and_both_forms(implementation: str) -> None:
    """A padded sample is what it is alone; masked (with gradients) and skipped (without) are one function."""
    plain = llama(implementation)
    ids = torch.randint(0, 32, (2, 11))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    call = {"input_ids": ids, "attention_mask": mask, "use_cache": False}
    model = gatecc.transform(plain, gatecc.recipe("seer-attention", block=4, width=4, share=0.4), call)
    everything = gatecc.transform(plain, gatecc.recipe("seer-attention", block=4, width=4, share=1.0), call)
    masked = model(**call).logits
    with torch.no_grad():
        skipped = model(**call).logits
        kept, dense = everything(**call).logits, plain(**call).logits
        shorter = {"input_ids": ids[:1, 4:], "attention_mask": mask[:1, 4:], "use_cache": False}
        alone = model(**shorter).logits
    real = mask > 0
    assert torch.allclose(masked[real], skipped[real], atol=1e-5)
    assert torch.allclose(kept[real], dense[real], atol=1e-5)
    assert not torch.allclose(skipped[real], dense[real], atol=1e-4)
    assert torch.allclose(alone[0], skipped[0, 4:], atol=1e-5)  # padding fills one whole block
    reverted(model, plain, (), call)


@pytest.mark.parametrize("name", ["timm/vit-sdpa", "hf/gpt2-eager"])
def test_all_blocks_kept_is_dense(name: str) -> None:
    known = case(name)
    model = gatecc.transform(known.model, gatecc.recipe("seer-attention", block=3, width=4, share=1.0), known.inputs)
    reverted(model, known.model, known.args, known.kwargs)


def test_gates_learn_where_attention_is_and_nothing_else_does() -> None:
    plain = llama()
    ids = torch.randint(0, 32, (4, 16))
    call = {"input_ids": ids, "use_cache": False}
    model = gatecc.transform(plain, gatecc.recipe("seer-attention", block=4, width=8, share=0.5), call)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with torch.no_grad():
        assert torch.equal(model.train()(**call).logits, plain.train()(**call).logits)  # dense while it learns
    stage = Tune(25, lr=2e-2, train=("*.gate.*",), loss=lambda out, batch: out.logits.sum() * 0)
    start = divergence(model, call)
    heal(model, None, [call], tune=stage, progress=False)
    assert divergence(model, call) < 0.7 * start
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(new_parameters(model, plain))


def divergence(model: Any, call: dict[str, Any]) -> float:
    """The sum of the losses of all gates."""
    routing.step(model)
    model.train()(**call)
    return sum(float(loss["blocks"]) for loss in gatecc.aux_losses(model).values())


def test_what_does_not_fit() -> None:
    with pytest.raises(ArgumentError, match="width is out of range"):
        Blocks(width=3)
    with pytest.raises(ArgumentError, match="share is out of range"):
        Blocks(share=0)
    plain = llama(attention_dropout=0.1)
    call = {"input_ids": torch.randint(0, 32, (2, 8)), "use_cache": False}
    with pytest.raises(SiteRefusedError, match=r"dropout 0.1 of the weights"):
        gatecc.transform(plain, gatecc.recipe("seer-attention", block=4, width=4, joint=True), call).train()(**call)


def test_bfloat16_and_lengths_of_less_than_a_block() -> None:
    plain = llama().bfloat16()
    call = {"input_ids": torch.randint(0, 32, (1, 9)), "use_cache": False}
    model = gatecc.transform(plain, gatecc.recipe("seer-attention", block=4, width=4, share=1.0), call, verify=False)
    for length in (9, 3, 1, 30):
        ids = torch.randint(0, 32, (2, length))
        with torch.no_grad():
            got, dense = (m(input_ids=ids, use_cache=False).logits for m in (model, plain))
        assert torch.allclose(got, dense, atol=0.03)
