"""Linear attention in ONNX: every form of the operator, a converted transformer, and a state space model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from gatecc.errors import ExportError
from gatecc.ops.linear_attention import linear_attention

pytest.importorskip("onnxruntime")
NODE = "com.microsoft::LinearAttention"


class Forms(nn.Module):
    """All that the operator knows, Dk != Dv, two query heads for one of the keys."""

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        """x: (B, N, 20)"""
        q, k, v, g = x.split((8, 4, 3, 5), -1)
        q, k, v = q.unflatten(-1, (2, 4)).transpose(1, 2), k.unsqueeze(1), v.unsqueeze(1)
        channel, head = -F.softplus(g[..., :4]).unsqueeze(1), -F.softplus(g[..., 4:]).unsqueeze(1) * 8
        beta, start = g[..., :1].sigmoid().mT, torch.ones(x.size(0), 2, 4, 3)
        return (
            *linear_attention(q, k, v),
            *linear_attention(q, k, v, channel, initial_state=start, mask=mask),
            linear_attention(q.exp(), k.exp(), v, head, normalize=True, mask=mask)[0],
            linear_attention(q, F.normalize(k, dim=-1), v, None, beta, scale=2.0)[0],
            *linear_attention(q, F.normalize(k, dim=-1), v, head, beta, reverse=True),
            linear_attention(q, k, v, g[..., :4].unsqueeze(1), gate_normalizer=16.0)[0],
        )


def test_every_form_of_the_operator(tmp_path: Path) -> None:
    mask = torch.ones(2, 7, dtype=torch.bool)
    mask[0, :3] = False
    made = gatecc.export(Forms(), tmp_path / "out", (torch.randn(2, 7, 20), mask))
    assert made.operators[NODE] == 6
    assert {c.sizes["batch"] for c in made.compared} == {1, 3}
    assert len({c.sizes["sequence"] for c in made.compared}) == 4


class Two(nn.Module):
    """What differs between the targets: a state to start from and to give back, a rule with and one without beta."""

    def forward(self, x: Tensor, start: Tensor) -> tuple[Tensor, ...]:
        """x: (B, N, 16), start: (B, 2, 4, 4)"""
        q, k, v = (y.unflatten(-1, (-1, 4)).transpose(1, 2) for y in x.split((8, 4, 4), -1))
        g = -F.softplus(k)
        return (
            *linear_attention(q, k, v, g, initial_state=start),
            linear_attention(q, F.normalize(k, dim=-1), v, g, g[..., 0].exp())[0],
        )


@pytest.mark.parametrize(("target", "node"), [("opset27", "LinearAttention"), ("portable", "Scan")])
def test_the_same_in_operators_of_the_standard(target: Any, node: str, tmp_path: Path) -> None:
    example = torch.randn(2, 7, 16), torch.randn(2, 2, 4, 4)
    made = gatecc.export(Two(), tmp_path / "out", example, target=target)
    assert made.operators[node] == 2
    assert not [op for op in made.operators if "::" in op]
    assert made.opset == (27 if target == "opset27" else 24)
    assert {(c.sizes["batch"], c.sizes["sequence"]) for c in made.compared} > {(3, 7), (1, 131)}
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    typed = {v.name for v in (*proto.graph.value_info, *proto.graph.output) if v.type.tensor_type.HasField("shape")}
    assert {name for n in proto.graph.node for name in n.output} <= typed


class Wide(nn.Module):
    """In float64."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, H, N, D)"""
        return linear_attention(x.double(), x.double(), x.double())[0]


def test_what_the_node_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="float64"):
        gatecc.export(Wide(), tmp_path / "out", (torch.randn(2, 2, 5, 4),))
    assert not (tmp_path / "out").exists()


def test_a_converted_llama(tmp_path: Path) -> None:
    """Its layers are handed masks that alone prove nothing: the whole graph is exported."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    llama: Any = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids = torch.randint(0, 32, (2, 9))
    model = gatecc.transform(llama, gatecc.recipe("gla", gate=False), {"input_ids": ids}, verify=False)
    made = gatecc.export(model, tmp_path / "out", {"input_ids": ids})
    assert made.operators[NODE] == 1
    assert made.outputs == {"logits": ["batch", "sequence", 32]}
    assert {c.sizes["sequence"] for c in made.compared} == {1, 7, 9, 12, 131}


def test_a_state_space_model(tmp_path: Path) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    model: Any = MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=8, num_hidden_layers=1, state_size=4)).eval()
    made = gatecc.export(model, tmp_path / "out", {"input_ids": torch.randint(0, 32, (2, 9))})
    assert made.operators[NODE] == 1
    assert {c.sizes["sequence"] for c in made.compared} == {1, 7, 9, 12, 131}
