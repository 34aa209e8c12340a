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
    """At batch 1 and 3 and at other lengths than the example's. Equal tokens choose equal experts, all others get
    none."""
    import onnxruntime
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 29, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts: dict[str, Any] = {"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "num_experts": 4}
    config = Qwen2MoeConfig(**sizes, **experts, num_experts_per_tok=2, num_key_value_heads=2, intermediate_size=16)
    model: Any = Qwen2MoeForCausalLM(config).eval()
    made = gatecc.export(model, tmp_path / "x", {"input_ids": torch.randint(29, (2, 8))})
    assert made.outputs["logits"] == ["batch", "sequence", 29]
    assert {c.sizes["sequence"] for c in made.compared} == {1, 7, 8, 11, 131}
    assert made.lowered["experts: gatecc::moe_ffn"] == 1
    assert not {"Mod", "IsNaN", "CumSum", "GatherND"} & made.operators.keys()  # of transformers' sums over experts
    path = tmp_path / "x" / "model.onnx"
    session: Any = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    equal, mixed = torch.full((3, 5), 7), torch.randint(29, (3, 13))
    for ids, chosen in ((equal, 2), (equal[:1, :1], 2), (mixed, 4), (mixed[:1], 4)):
        with torch.no_grad():
            expected = model(ids, output_router_logits=True)
        (routes,) = expected.router_logits
        assert len(routes.topk(2, -1).indices.unique()) == chosen
        (found,) = session.run(["logits"], {"input_ids": ids.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected.logits, rtol=1e-5, atol=1e-5)
    graph = onnx.load(path).graph
    typed = {v.name for v in (*graph.value_info, *graph.output) if v.type.tensor_type.HasField("shape")}
    assert {name for node in graph.node for name in node.output if name} <= typed
    owners = {node.name.rpartition("/")[0] for node in graph.node if node.op_type in ("Gemm", "MatMul")}
    modules = dict(model.named_modules())
    assert "model.layers.0.mlp.experts" in owners
    assert owners <= modules.keys()
    assert not any(held.metadata_props or held.doc_string for held in (graph, *graph.node, *graph.value_info))
