"""Graphs that exported ones are measured against, each as good as it can be had without gatecc. See onnx_export.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn


def mixture(width: int = 256, hidden: int = 512, experts: int = 8, k: int = 2) -> nn.Module:
    """The mixture of experts of Mixtral, as torch.onnx can export it: `batched_mm` copies a matrix for each token."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    sizes: dict[str, Any] = dict(
        hidden_size=width, intermediate_size=hidden, num_local_experts=experts, num_experts_per_tok=k
    )
    config = MixtralConfig(**sizes)
    config._experts_implementation = "batched_mm"
    block = MixtralSparseMoeBlock(config)
    for weight in block.parameters():
        nn.init.normal_(weight, std=weight.shape[-1] ** -0.5)
    return block.eval()


def contrib_mixture(block: Any, folder: Path) -> Path:
    """The same block as one ``com.microsoft.MoE`` behind its router."""
    folder.mkdir(parents=True)
    width = block.gate.weight.shape[1]

    def interleaved(stack: Tensor) -> Tensor:
        return torch.stack(stack.chunk(2, 1), 2).reshape(stack.shape)

    weights = {
        "router": block.gate.weight.t(),
        "gate_up": interleaved(block.experts.gate_up_proj),
        "down": block.experts.down_proj,
    }
    held = [numpy_helper.from_array(w.detach().contiguous().numpy(), name) for name, w in weights.items()]
    shape = numpy_helper.from_array(torch.tensor([-1, width]).numpy(), "rows")
    nodes = [
        helper.make_node("Reshape", ["hidden_states", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "router"], ["logits"]),
        helper.make_node(
            "MoE",
            ["flat", "logits", "gate_up", "", "down"],
            ["mixed"],
            domain="com.microsoft",
            k=block.top_k,
            activation_type="swiglu",
            swiglu_fusion=1,
            activation_alpha=1.0,
            activation_beta=0.0,
            normalize_routing_weights=1,
        ),
        helper.make_node("Shape", ["hidden_states"], ["shape"]),
        helper.make_node("Reshape", ["mixed", "shape"], ["output_0"]),
    ]
    ends = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "sequence", width])]
        for name in ("hidden_states", "output_0")
    ]
    graph = helper.make_graph(nodes, "mixture", ends[0], ends[1], [*held, shape])
    opsets = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), folder / "model.onnx")
    return folder / "model.onnx"
