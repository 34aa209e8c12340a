"""Prefixes of keys and values, against attention that is written down and against a cache that holds the prefix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, CallNotCapturedError, SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.prefix import Prefix, joint
from gatecc.recipes import samples
from tests.graphs import MLP, attention, done
from tests.recipes.checks import new_parameters, randomise, reverted

HEADS = Selector.parse("attention[...].heads")
JOINT = Branch(HEADS, Prefix(3), op="lerp")
GATED = Branch(HEADS, Prefix(3, softmax="apart"), GateSpec("param", "none", "head", "tanh", init="zero"))
BOOL = torch.tensor([[True, False, True], [False, False, False], [True, True, True]])
MASKS: dict[str, tuple[bool, str, str, Tensor]] = {
    "none": (False, "None", "", torch.zeros(3, 3)),
    "causal": (True, "None", "", torch.full((3, 3), -torch.inf).triu(1)),
    "input": (False, "%mask", "%mask = input  # n n", torch.zeros(3, 3)),
}


@pytest.mark.parametrize("kind", MASKS)
def test_a_joint_softmax_over_prefix_and_tokens(kind: str) -> None:
    causal, mask, inputs, added = MASKS[kind]
    result = done(attention(causal, mask, inputs), JOINT)
    v = result.values
    added = v.get("mask", added)
    prefix = result.program.module.get_submodule("att.prefix")
    keys, values = (prefix.get_parameter(n).repeat_interleave(2, 0).expand(2, -1, -1, -1) for n in ("keys", "values"))
    scores = torch.cat([v["qh"] @ keys.mT, v["qh"] @ v["kr"].mT], -1) / 2**0.5 + nn.functional.pad(added, (3, 0))
    heads = scores.softmax(-1) @ torch.cat([values, v["vr"]], 2)
    expected = heads.transpose(1, 2).flatten(2) @ result.program.module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)
    assert prefix.get_parameter("keys").shape == (2, 3, 2)  # one for each key head


def test_a_softmax_over_the_prefix_alone_is_added() -> None:
    result = done(attention(True), GATED)
    assert result.error == 0
    module, v = result.program.module, result.values
    nn.init.constant_(next(module.get_submodule("att.branch").parameters()), 0.7)
    keys, values = (module.get_parameter(f"att.prefix.{name}").repeat_interleave(2, 0) for name in ("keys", "values"))
    more = (v["qh"] @ keys.mT / 2**0.5).softmax(-1) @ values
    heads = v["heads"] + torch.tanh(torch.tensor(0.7)) * more
    expected = heads.transpose(1, 2).flatten(2) @ module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_a_query_that_sees_no_token_sees_the_prefix() -> None:
    """Alone, its softmax would be NaN."""
    q, k, v = torch.randn(3, 1, 2, 3, 4).unbind()
    keys, values = torch.randn(2, 2, 3, 4).unbind()
    got = joint(q, k, v, keys, values, BOOL, 0.0, False, None)
    expected = (q[:, :, 1:2] @ keys.mT / 2).softmax(-1) @ values
    assert torch.allclose(got[:, :, 1:2], expected, atol=1e-6)


def test_decoded_exported_compiled_saved_and_reverted(tmp_path: Path) -> None:
    """The joint softmax; the cases of the recipe prefix-tuning try the other."""
    plain, inputs = samples.language()
    model = gatecc.transform(plain, JOINT, inputs, verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    with torch.no_grad():
        expected = model(*inputs)
        assert not torch.allclose(expected, plain(*inputs), atol=1e-2)
        gatecc.save(model, tmp_path / "saved")
        assert torch.equal(gatecc.load(samples.language()[0], tmp_path / "saved")(*inputs), expected)
        decoder = gatecc.decoder(model, inputs)
        first, state = decoder.prefill(inputs[0][:, :3])
        steps = [first]
        for at in range(3, 8):
            step, state = decoder.step(inputs[0][:, at : at + 1], state)
            steps.append(step)
        assert torch.allclose(torch.cat(steps, 1), expected, atol=1e-5)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        assert torch.allclose(compiled(inputs[0][:, :5]), expected[:, :5], atol=1e-5)
        assert gatecc.export(model, tmp_path / "onnx", inputs).compared
    reverted(model, plain, inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_with_a_cache_that_holds_the_prefix(implementation: str) -> None:
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "vocab_size": 32}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "attn_implementation": implementation}
    plain: Any = LlamaForCausalLM(LlamaConfig(**shape)).eval()
    ids = torch.randint(0, 32, (2, 6))
    padding = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    model: Any = gatecc.transform(
        plain, JOINT, {"input_ids": ids, "attention_mask": padding, "use_cache": False}, verify=False
    )
    assert "the keys of the prefix have no position" in str(gatecc.last_report(model))
    cache = DynamicCache(config=plain.config)
    with torch.no_grad():
        for number, layer in enumerate(model.model.layers):
            prefix = layer.self_attn.prefix
            prefix.values.normal_()
            cache.update(*(x.expand(2, -1, -1, -1) for x in (prefix.keys, prefix.values)), number)
        got = model(input_ids=ids, attention_mask=padding, use_cache=False).logits
        seen = nn.functional.pad(padding, (3, 0), value=1)
        positions = torch.arange(6).expand(2, -1)
        expected = plain(input_ids=ids, attention_mask=seen, position_ids=positions, past_key_values=cache).logits
        assert torch.allclose(got[padding > 0], expected[padding > 0], atol=1e-5)
        with pytest.raises(CallNotCapturedError, match="cache"):  # a mask of that call is not what the graph holds
            model(input_ids=ids, past_key_values=DynamicCache(config=plain.config))


def test_projected_from_a_vector_of_each_sample() -> None:
    plain, (args, given) = samples.described()
    rewrite = Branch(HEADS, Prefix(2, "apart", "text"), GateSpec("param", "none", "scalar", "linear", init="zero"))
    model: Any = gatecc.transform(plain, rewrite, (args, given), verify=False)
    randomise(new_parameters(model, plain).values(), 0.5)
    with torch.no_grad():
        one = model(*args, text=given["text"])
        rows = [model(args[0][i : i + 1], text=given["text"][i : i + 1]) for i in range(2)]
        assert torch.allclose(torch.cat(rows), one, atol=1e-5)
        # beside the base model's own use of the text: what the prefix of the other text makes of this sample
        attn, seen = model.blocks[0].attn, list[Tensor]()
        handle = attn.o_proj.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(*args, text=given["text"])
        handle.remove()
        x = plain.get_submodule("blocks.0.norm1")(plain.embed(args[0]) + plain.text(given["text"]).unsqueeze(1))  # pyright: ignore[reportCallIssue]
        q, k, v = (p(x).unflatten(-1, (-1, 4)).transpose(1, 2) for p in (attn.q_proj, attn.k_proj, attn.v_proj))
        k, v = (t.repeat_interleave(2, 1) for t in (k, v))
        heads = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        keys, values = (
            getattr(attn.prefix, name)(given["text"]).unflatten(-1, (2, 2, 4)).repeat_interleave(2, 1)
            for name in ("keys", "values")
        )
        heads = heads + next(attn.branch.parameters()) * ((q @ keys.mT / 2).softmax(-1) @ values)
        assert torch.allclose(seen[0], heads.transpose(1, 2).flatten(2), atol=1e-5)


def test_what_a_prefix_is_not() -> None:
    with pytest.raises(ArgumentError, match=r"meets the value otherwise[\s\S]*lerp"):
        Branch(HEADS, Prefix(3))
    with pytest.raises(ArgumentError, match=r"meets the value otherwise[\s\S]*add"):
        Branch(HEADS, Prefix(3, softmax="apart"), op="lerp")
    with pytest.raises(SiteRefusedError, match="attention between tokens"):
        done(MLP, Branch(Selector.parse("mlp[...].out"), Prefix(3), op="lerp"))
