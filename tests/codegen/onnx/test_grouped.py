"""The experts of a mixture: rows are split by expert, and the number of tokens stays free."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc

pytest.importorskip("onnxruntime")


class Grouped(nn.Module):
    """Half of the rows are for the first of three matrices, none for the second, the last row for none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 4, 5))

    def forward(self, x: Tensor) -> Tensor:
        """x: (S, 4) -> (S, 5)"""
        half = (torch.arange(x.size(0)) * 2 < x.size(0) - 1).sum()
        ends = torch.stack([half, half, torch.tensor(x.size(0) - 1)])
        return torch.ops.transformers.grouped_mm_fallback(x, self.weight, ends)


def test_rows_of_each_group_and_of_none(tmp_path: Path) -> None:
    pytest.importorskip("transformers.integrations.moe")  # it registers the operator
    made = gatecc.export(Grouped(), tmp_path / "x", (torch.randn(7, 4),))
    assert made.inputs == {"x": ["batch", 4]}
    assert max(c.error for c in made.compared) < 1e-6
    assert made.operators["MatMul"] >= 3


def test_a_mixture_of_experts(tmp_path: Path) -> None:
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts: dict[str, Any] = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    config = Qwen2MoeConfig(**sizes, **experts, num_experts_per_tok=2, num_key_value_heads=2, intermediate_size=16)
    model: Any = Qwen2MoeForCausalLM(config).eval()
    made = gatecc.export(model, tmp_path / "x", {"input_ids": torch.randint(29, (2, 8))})
    assert made.outputs["logits"] == ["batch", "sequence", 29]
    assert len(made.compared) == 4
