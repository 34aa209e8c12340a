"""The experts of a mixture: rows are split by expert, and the number of tokens stays free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc

onnx: Any = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


class Grouped(nn.Module):
    """Half of the rows are for the first of three matrices, none for the second, the last row for none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 40, 80) / 40**0.5)  # more numbers than torch.onnx folds

    def forward(self, x: Tensor) -> Tensor:
        """x: (S, 40) -> (S, 80)"""
        half = (torch.arange(x.size(0)) * 2 < x.size(0) - 1).sum()
        return self.product(x, torch.stack([half, half * 0, x.size(0) - 1 - half, torch.ones_like(half)]))

    def product(self, x: Tensor, counts: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, counts.cumsum(0)[:3])


class Computed(Grouped):
    """The matrices are known when the graph runs."""

    def product(self, x: Tensor, counts: Tensor) -> Tensor:
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight * x.mean(), counts.cumsum(0)[:3])


class Tied(Grouped):
    """Two products with one stack of matrices, the other way round the second time."""

    def product(self, x: Tensor, counts: Tensor) -> Tensor:
        y = super().product(x, counts)
        return torch.ops.transformers.grouped_mm_fallback(y, self.weight.mT, counts.cumsum(0)[:3])


MODELS = {"constant": (Grouped, 3), "computed": (Computed, 1), "tied": (Tied, 3)}


@pytest.mark.parametrize("kind", MODELS)
def test_rows_of_each_group_and_of_none(tmp_path: Path, kind: str) -> None:
    pytest.importorskip("transformers.integrations.moe")  # it registers the operator
    model, matrices = MODELS[kind]
    made = gatecc.export(model(), tmp_path / "x", (torch.randn(7, 40),))
    assert made.inputs == {"x": ["batch", 40]}
    assert max(c.error for c in made.compared) < 3e-6
    assert made.operators["Gemm"] == (6 if kind == "tied" else 3)
    graph = onnx.load(tmp_path / "x" / "model.onnx").graph
    assert sum(len(x.dims) > 1 for x in graph.initializer) == matrices  # of one group each, of both products
    assert not {node.domain for node in graph.node} - {""}


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts: dict[str, Any] = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    config = Qwen2MoeConfig(**sizes, **experts, num_experts_per_tok=2, num_key_value_heads=2, intermediate_size=16)
    model: Any = Qwen2MoeForCausalLM(config).eval()
    made = gatecc.export(model, tmp_path / "x", {"input_ids": torch.randint(29, (2, 8))})
    assert made.outputs["logits"] == ["batch", "sequence", 29]
    assert {c.sizes["sequence"] for c in made.compared} == {1, 7, 8, 11, 131}
