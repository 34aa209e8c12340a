"""Grouped products of torch and of transformers: mixtures of experts that nobody has rewritten are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ExportError
from gatecc.ops import registry

pytest.importorskip("onnxruntime")
moe: Any = pytest.importorskip("transformers.integrations.moe")
SIZES: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2}
SIZES["experts_implementation"] = "grouped_mm"


def mixtral() -> nn.Module:
    """The experts of Mixtral with their router."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    return MixtralSparseMoeBlock(MixtralConfig(**SIZES))


def gpt_oss() -> nn.Module:
    """Those of gpt-oss: rows of gate and up in turn, biases, matrices that are transposed."""
    from transformers import GptOssConfig
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

    return GptOssMLP(GptOssConfig(**SIZES))


@pytest.mark.parametrize("block", [mixtral, gpt_oss])
def test_a_block_of_experts(tmp_path: Path, block: Any) -> None:
    model = block().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    made = gatecc.export(model, tmp_path / "x", (torch.randn(2, 7, 16),))
    assert max(c.error for c in made.compared) < 1e-6
    assert made.operators["Gemm"] >= 8
    assert made.operators["Split"] >= 2


class Product(nn.Module):
    """Rows times the matrix of their group, as torch has it."""

    def __init__(self, stacked: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 8, dtype=torch.bfloat16))
        self.stacked = stacked

    def forward(self, x: Tensor, ends: Tensor) -> Tensor:
        """x: (S, 16) -> (S, 8)"""
        if self.stacked:
            return torch.ops.aten._grouped_mm(x.expand(3, *x.shape), self.weight)
        return torch.ops.aten._grouped_mm(x, self.weight, ends)


def test_the_operator_of_torch(tmp_path: Path) -> None:
    given = torch.randn(8, 16, dtype=torch.bfloat16), torch.tensor([2, 2, 8], dtype=torch.int32)
    made = gatecc.export(Product(False), tmp_path / "x", given, verify=False)
    assert made.operators["Gemm"] == 3
    with pytest.raises(ExportError, match="no ONNX form"):
        gatecc.export(Product(True), tmp_path / "y", given, verify=False)


def test_flops() -> None:
    entry = registry.find(torch.ops.transformers.grouped_mm_fallback.default)
    assert entry is not None
    assert entry.flops is not None
    assert entry.flops((7, 4), (3, 4, 5), (3,)) == 2 * 7 * 4 * 5
    assert entry.flops((3, 7, 4), (3, 4, 5)) == 2 * 3 * 7 * 4 * 5


def test_an_operator_of_a_library_that_is_not_there() -> None:
    registry.register_later("gatecc_absent::operator", lambda overload: pytest.fail(str(overload)))
    try:
        assert registry.find(torch.ops.aten.mul.Tensor) is None
        assert registry.lowerings("portable")
    finally:
        del registry._LATER["gatecc_absent::operator"]
