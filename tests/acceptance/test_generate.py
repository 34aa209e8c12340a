"""generate with a KV cache after gated attention with random gates: the tokens of a reference that gates in Python."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as hf
from torch import nn
from torch.overrides import TorchFunctionMode

import gatecc


def llama(attention: str) -> Any:
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return hf.LlamaForCausalLM._from_config(config, attn_implementation=attention)


def qwen(attention: str) -> Any:
    config = hf.Qwen3Config(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        pad_token_id=0,
        eos_token_id=None,
    )
    return hf.Qwen3ForCausalLM._from_config(config, attn_implementation=attention)


def gpt2(attention: str) -> Any:
    config = hf.GPT2Config(vocab_size=97, n_embd=64, n_layer=2, n_head=4, pad_token_id=0, eos_token_id=None)
    return hf.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def gpt_oss(attention: str) -> Any:
    """Sinks: a column of the softmax is cut off before the product. Windows in every other layer."""
    config = hf.GptOssConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=2,
        num_experts_per_tok=1,
        sliding_window=6,
        pad_token_id=0,
        eos_token_id=None,
    )
    return hf.GptOssForCausalLM._from_config(config, attn_implementation=attention)


class _Gated(TorchFunctionMode):
    """Multiplies the result of each attention core by the gate of the module that runs it."""

    def __init__(self, gate: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.gate = gate
        self.hidden = hidden
        self.weights: torch.Tensor | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is F.softmax:
            self.weights = out
        heads = func is F.scaled_dot_product_attention
        weighted = self.weights is not None and args[0].shape[:-1] == self.weights.shape[:-1]
        heads = heads or (func is torch.matmul and weighted)
        if not heads:
            return out
        self.weights = None
        z = F.linear(self.hidden, self.gate.get_parameter("weight"), self.gate.get_parameter("bias"))
        gate = (2 * torch.sigmoid(z)).transpose(1, 2).unsqueeze(-1)  # (b, h, n, 1)
        apart = out.reshape(*gate.shape[:3], out.shape[-1])  # decoding merges the heads of a group into tokens
        return (apart * gate).reshape(out.shape)


def reference(model: Any, gated: Any, owners: list[str]) -> Any:
    """The model with the gates of ``gated`` applied in Python around each owner's own forward."""
    twin = copy.deepcopy(model)
    for owner in owners:
        module, gate = twin.get_submodule(owner), gated.get_submodule(f"{owner}.gate")
        original = module.forward

        def forward(*args: Any, _original: Any = original, _gate: Any = gate, **kwargs: Any) -> Any:
            with _Gated(_gate, args[0] if args else kwargs["hidden_states"]):
                return _original(*args, **kwargs)

        module.forward = forward
    return twin


CASES = [(build, attention) for build in (llama, gpt2, qwen) for attention in ("sdpa", "eager")]


@pytest.mark.broad(2)
@pytest.mark.parametrize(("build", "attention"), [*CASES, (gpt_oss, "eager")])
def test_generated_tokens(build: Any, attention: str) -> None:
    torch.manual_seed(0)
    model = build(attention).eval()
    ids = torch.randint(5, 96, (2, 12))
    gated: Any = gatecc.transform(model, "gated-attention", (ids,), verify=False)
    for name, p in gated.named_parameters():
        if ".gate." in name:
            nn.init.normal_(p, std=2.0)
    owners = [s.owner for s in gatecc.last_report(gated).sites if s.kind == "attention"]
    expected = reference(model, gated, owners)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    tokens = gated.generate(ids, **options)
    assert torch.equal(tokens, expected.generate(ids, **options))
    assert torch.equal(tokens, gated.generate(ids, use_cache=False, **options)), "graphs and the Python path agree"
    assert not torch.equal(tokens, model.generate(ids, **options)), "the gates act"
    padded = torch.ones_like(ids)
    padded[1, :4] = 0
    assert torch.equal(
        gated.generate(ids, attention_mask=padded, **options), expected.generate(ids, attention_mask=padded, **options)
    )
    for more in ({"num_beams": 2}, {"cache_implementation": "static"}):
        assert torch.equal(gated.generate(ids, **options, **more), expected.generate(ids, **options, **more))


def test_a_model_that_can_serve_no_cache_is_called_without_one() -> None:
    """Gates on residuals cannot be done in Python: the configuration's cache is off, and on again after revert."""
    torch.manual_seed(0)
    plain = llama("sdpa").eval()
    ids = torch.randint(1, 97, (2, 6))
    gated: Any = gatecc.transform(plain, "residual-gates", {"input_ids": ids}, verify=False)
    assert any("use_cache" in note for note in gatecc.last_report(gated).notes)
    assert torch.allclose(gated(input_ids=ids).logits, plain(input_ids=ids, use_cache=False).logits, atol=1e-6)
    wanted = plain.generate(ids, max_new_tokens=3, do_sample=False)
    for use_cache in (False, True):  # True: the state of the derived decoder
        assert torch.equal(gated.generate(ids, max_new_tokens=3, do_sample=False, use_cache=use_cache), wanted)
    with pytest.raises(gatecc.GateccError, match="use_cache=False"):
        gated(ids, use_cache=True)
    assert plain.config.use_cache
    back: Any = gatecc.revert(gated)
    assert back.config.use_cache
