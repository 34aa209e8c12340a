"""What torch.onnx alone gets wrong: batches behind a rotary embedding, causal attention, opset 26, experts.

The length of an LSTM, which it fixes, is in tests/ops/rnn/test_onnx.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError

pytest.importorskip("onnxruntime")
transformers = pytest.importorskip("transformers")
SIZES: dict[str, Any] = dict(
    vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, use_cache=False,
)  # fmt: skip
IDS = torch.randint(0, 61, (2, 7), generator=torch.Generator().manual_seed(0))


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def test_a_rotary_embedding_at_batch_3_and_causal_attention_that_says_so(tmp_path: Path) -> None:
    """At opset 23 torch.onnx fuses a rotary embedding that runs at batch 1 alone; at 24 its attention is given a mask
    that is made anew in each call, and ``is_causal`` is lost."""
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES)).eval()
    made = gatecc.export(llama, tmp_path / "x", {"input_ids": IDS}, target="portable", opset=23)
    assert {c.sizes["batch"] for c in made.compared} == {1, 3}
    nodes = onnx.load(tmp_path / "x" / "model.onnx").graph.node
    (attention,) = (n for n in nodes if n.op_type == "Attention")
    assert attributes(attention)["is_causal"] == 1
    assert len(attention.input) == 3
    assert sum(n.op_type == "RotaryEmbedding" for n in nodes) == 2
    assert not any(n.op_type in ("Where", "And", "LessOrEqual", "GreaterOrEqual") for n in nodes)


class Causal(nn.Module):
    """Attention as it is called."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, 16)"""
        x = x.unflatten(-1, (2, 8)).transpose(1, 2)
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@pytest.mark.parametrize(("opset", "target"), [(25, "portable"), (27, "opset27")])
def test_the_stamp_is_the_opset_that_was_asked_for(opset: int, target: Any, tmp_path: Path) -> None:
    """Asked for 26, torch.onnx writes nodes of 23 under the stamp 18 and says nothing."""
    example = (torch.randn(2, 5, 16),)
    with pytest.raises(ArgumentError, match="26"):
        gatecc.export(Causal(), tmp_path / "none", example, opset=26, target=target)
    made = gatecc.export(Causal(), tmp_path / "x", example, opset=opset, target=target)
    assert made.opset == opset
    assert {o.domain: o.version for o in onnx.load(tmp_path / "x" / "model.onnx").opset_import} == {"": opset}
    assert made.operators["Attention"] == 1


def test_experts_of_transformers_as_they_come(tmp_path: Path) -> None:
    """torch.onnx has no form of the products by expert, fails at the loop over them, and writes a matrix per token of
    ``batched_mm``."""
    config = transformers.MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
    made = gatecc.export(transformers.MixtralForCausalLM(config).eval(), tmp_path / "x", {"input_ids": IDS})
    assert made.operators["Gemm"] >= 2 * 4
    assert {(c.sizes["batch"], c.sizes["sequence"]) for c in made.compared} > {(3, 7), (1, 1)}
    assert {"batch", "sequence"} == set(made.dims)
