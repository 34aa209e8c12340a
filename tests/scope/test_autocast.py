"""Autocast: a scope captures anew under it, for a graph bakes in dtypes; token mixers run in bfloat16 as in float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ops.linear_attention import linear_attention
from tests.train.lm import LM, VOCABULARY

IDS = torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(0))
HEALED = {"feature": "hedgehog", "rope": True, "normalize": True, "norm": False, "gate": False, "conv": 4}
RECIPES = {"gla": gatecc.recipe("gla", **HEALED), "liger": gatecc.recipe("liger", window=4)}


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    shape |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
    return LlamaForCausalLM(LlamaConfig(**shape)).eval()


def bfloat16() -> torch.autocast:
    return torch.autocast("cpu", torch.bfloat16)


@pytest.mark.parametrize("name", RECIPES)
def test_mixers_train_under_autocast_and_are_as_before_outside_of_it(name: str) -> None:
    model: Any = gatecc.transform(llama(), RECIPES[name], {"input_ids": IDS}, verify=False)
    before: Tensor = model(input_ids=IDS).logits
    with bfloat16():
        cast: Tensor = model(input_ids=IDS).logits
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert cast.dtype is torch.bfloat16
    assert 0 < float((cast - before).detach().abs().max()) <= 0.02 * float(before.detach().abs().max())
    cast.float().square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_a_model_first_called_under_autocast_is_right_without_it() -> None:
    model: Any = gatecc.transform(LM(1).eval(), gatecc.recipe("scalar-decay", gate=False), (IDS,), verify=False)
    expected = model(IDS)
    model.train()
    with bfloat16():
        model(IDS)
    assert torch.equal(model(IDS), expected)


def test_compilation_and_export_see_autocast_as_the_scope_does() -> None:
    from torch._dynamo.testing import CompileCounter

    model: Any = gatecc.transform(LM(1).eval(), gatecc.recipe("retention", gate=False), (IDS,), verify=False)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter)
    with torch.no_grad(), bfloat16():
        expected = model(IDS)
        assert torch.equal(compiled(IDS), expected)
        exported = torch.export.export(model, (IDS,), strict=False).module()
        assert torch.equal(exported(IDS), expected)
    assert counter.frame_count == 1


def test_operands_of_several_dtypes_meet_in_the_widest_under_autocast_alone() -> None:
    q, k, v = torch.randn(3, 1, 2, 5, 4)
    with bfloat16():
        o, _ = linear_attention(q, k, v.bfloat16())
    assert torch.equal(o, linear_attention(q, k, v.bfloat16().float())[0])
    with pytest.raises(ArgumentError, match="one dtype"):
        linear_attention(q, k, v.bfloat16())
