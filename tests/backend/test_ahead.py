"""A lowered model ahead of time: an ExportedProgram of ATen operators, which AOTInductor compiles."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch import nn

import gatecc
from gatecc.backend import lowered_program
from gatecc.errors import ExportError
from gatecc.ops import registry
from tests.backend.test_backend import Masked, inputs
from tests.decoder.mixing import Convolution, D


class Two(nn.Module):
    """Two results of x by keyword, one masked attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = Masked()

    def forward(self, x: torch.Tensor, double: bool = False) -> dict[str, torch.Tensor]:
        y = self.attention(x)
        return {"y": y * 2 if double else y, "x": x + 1}


def test_it_is_lowered_and_takes_the_call_of_the_model() -> None:
    model, other = Two(), inputs(3, 7)
    program = lowered_program(model, {"x": inputs(), "double": True})
    attention = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert [n.args[5] for n in attention] == [True]
    assert set(program.state_dict) == {"m.attention.qkv.weight", "m.attention.qkv.bias"}
    found: Any = program.module()(x=other)
    expected = model.eval()(other, True)
    assert found.keys() == expected.keys()
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    with pytest.raises(AssertionError, match=r"(?s)x\.size\(\)\[2\] == 8"):
        program.module()(x=torch.randn(2, 3, 9))


def test_aot_inductor_compiles_it(tmp_path: Path) -> None:
    model = Masked()
    program = lowered_program(model, (inputs(),))
    place = str(tmp_path / "model.pt2")
    once = {"aot_inductor.precompile_headers": False}  # to precompile them takes longer than the one compilation
    path = torch._inductor.aoti_compile_and_package(program, package_path=place, inductor_configs=once)
    other = inputs(3, 7)
    assert torch.allclose(torch._inductor.aoti_load_package(path)(other), model(other), atol=1e-5)


def mixture() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=29,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
        use_cache=False,
    )
    return MixtralForCausalLM(config).eval(), {"input_ids": torch.randint(0, 29, (2, 5))}


def test_what_needs_a_kernel_behind_python_stays() -> None:
    model, example = mixture()
    program = lowered_program(model, example)
    names = [str(node.target) for node in program.graph.nodes]
    assert not any(name.startswith("gatecc.") for name in names)
    attention = [n for n in program.graph.nodes if "scaled_dot_product" in str(n.target)]
    assert [n.args[5] for n in attention] == [True]
    found: Any = program.module()(**example)
    assert torch.allclose(found.logits, model(**example).logits, atol=1e-5)


def test_a_model_with_such_a_kernel_is_refused_by_name() -> None:
    model, example = mixture()
    experts = gatecc.transform(model, "fast-experts", example)
    with pytest.raises(ExportError, match=r"(?s)moe_ffn.*torch\.compile"):
        lowered_program(experts, example)


def calls() -> dict[str, Callable[[torch.Tensor], Any]]:
    """What a model may call of gatecc's, on x: (2, 5, 8), by the name of the operator."""
    ops, experts = torch.ops.gatecc, (torch.randn(3, 8, 8), torch.randn(3, 8, 4))
    pooled, gru = torch.randn(2, 12, 4), (torch.randn(12, 8), torch.randn(12, 4), torch.randn(12), torch.randn(12))
    line = {"stride": [1], "padding": [0], "dilation": [1], "output_padding": [0], "groups": 1, "transposed": False}
    kernel, mask = torch.randn(6, 8, 1), torch.tensor([[True, False], [True, True]])

    def heads(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(2, (2, 4)).transpose(1, 2)

    def ffn(x: torch.Tensor) -> torch.Tensor:
        rows = x.flatten(0, 1)
        return ops.moe_ffn(rows, rows[:, :1].sigmoid(), rows.argmax(1, keepdim=True) % 3, *experts)

    return {
        "attention": lambda x: ops.attention(heads(x), heads(x), heads(x), heads(x), gate_activation="sigmoid"),
        "block_logits": lambda x: ops.block_logits(heads(x), heads(x), pooled, pooled, None, 2),
        "block_choice": lambda x: ops.block_choice(heads(x) @ heads(x).mT, torch.tensor(0.5), None, 1).to(x.dtype),
        "carried": lambda x: ops.carried(x, pooled[0], [1]),
        "chosen_blocks": lambda x: ops.chosen_blocks(
            *[heads(x)] * 5, pooled[:, :4], pooled, torch.tensor(0.5), block=2, scale=0.5
        ),
        "evicted_attention": lambda x: ops.evicted_attention(*[heads(x)] * 3, heads(x)[..., 0] > 0, scale=0.5),
        "gated_conv": lambda x: ops.gated_conv(x.mT, kernel, (x[:, 0, :6, None] > 0).to(x.dtype), **line),
        "group_linear": lambda x: ops.group_linear(x, experts[0][0], mask),
        "linear": lambda x: ops.linear(x, torch.ones(3, 8)),
        "linear_attention": lambda x: ops.linear_attention(heads(x), heads(x), heads(x)),
        "masked_linear": lambda x: ops.masked_linear(x, torch.ones(3, 8), None, (x[:, 0] > 0).to(x.dtype)),
        "moe_ffn": ffn,
        "spike": lambda x: ops.spike(x, 2.0),
        "transient": lambda x: ops.transient(x, x[..., 0] > 0, *gru),
        "short_convolution": lambda x: ops.short_convolution(x, torch.ones(8, 1, 3), activation="silu"),
    }


ELSEWHERE = {  # but for gradients: of training, of decoders, and what runs another way under torch.export
    *("moe_ffn_training", "block_peaks", "chosen_loss", "reinforce_sample", "inject_bce", "add_loss", "record"),
    *("linear_attention_step", "cached_attention", "only_if", "rnn", "sequences"),
}


def test_no_operator_was_forgotten() -> None:
    ours = {o.overload._opname for o in registry.operators() if o.overload.namespace == "gatecc"}
    assert {name for name in ours if not name.endswith("_backward")} == set(calls()) | ELSEWHERE


@pytest.mark.parametrize("name", calls())
def test_each_operator_is_refused_by_name_or_kept_for_python(name: str) -> None:
    class Calling(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = calls_of[name](x)
            return found[0] if isinstance(found, tuple) else found

    calls_of = calls()
    model = Calling()
    with pytest.raises(ExportError, match=rf"(?s)gatecc\.{name}\.default.*python=True"):
        lowered_program(model, (inputs(),))
    program = lowered_program(model, (inputs(),), python=True)
    assert f"gatecc.{name}.default" in [str(n.target) for n in program.graph.nodes]
    x = inputs(3, 7)
    assert torch.allclose(program.module()(x), model(x), atol=1e-6)


def test_lowerings_are_done_for_python_alone() -> None:
    layer, x = Convolution(cut=True).eval(), torch.randn(2, 9, D)
    for python in (False, True):
        program = lowered_program(layer, (x,), python=python)
        assert ("gatecc.short_convolution.default" in [str(n.target) for n in program.graph.nodes]) is python
        assert torch.allclose(program.module()(x), layer(x), atol=1e-5)
