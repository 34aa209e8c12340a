"""A lowered model ahead of time: an ExportedProgram of ATen operators, which AOTInductor compiles."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch._inductor
from torch import nn

import gatecc
from gatecc.backend import lowered_program
from gatecc.errors import ExportError
from tests.backend.test_backend import Masked, inputs


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
