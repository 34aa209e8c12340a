"""Graphs that exported ones are measured against, each as good as it can be had without gatecc. See onnx_export.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn
from torch._higher_order_ops.scan import scan


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


class Chunks(nn.Module):
    """Gated linear attention in plain operators: products inside chunks, and a state from chunk to chunk.

    ``scanned``: the states by torch's scan, which torch.onnx writes as Scan; else all at once, which takes as many
    products as there are pairs of chunks. Good for mild decays alone: exp(-sum) overflows otherwise.
    """

    def __init__(self, heads: int, chunk: int, *, scanned: bool) -> None:
        super().__init__()
        self.heads, self.chunk, self.scanned = heads, chunk, scanned

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """All (B, N, H * D); ``g`` is the logarithm of the decay -> (B, N, H * D)."""
        N, C = q.size(1), self.chunk
        q, k, v, g = (
            F.pad(x, (0, 0, 0, (C - N % C) % C))
            .unflatten(1, (-1, C))
            .unflatten(-1, (self.heads, -1))
            .permute(0, 3, 1, 2, 4)
            for x in (q, k, v, g)
        )
        b = g.cumsum(3)
        last = b[:, :, :, -1:]
        q, inner = q * b.exp() * q.size(-1) ** -0.5, k * (-b).exp()
        within = torch.tril(q @ inner.mT) @ v
        gained = (k * (last - b).exp()).mT @ v  # (B, H, chunks, D, D)
        before = self._scan(last, gained) if self.scanned else self._at_once(last.squeeze(3), gained)
        y = within + q @ before
        return y.permute(0, 2, 3, 1, 4).flatten(3).flatten(1, 2)[:, :N]

    def _scan(self, last: Tensor, gained: Tensor) -> Tensor:
        def step(state: Tensor, chunk: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
            decay, more = chunk
            return state * decay + more, state.clone()

        decays, rows = last.exp().mT.movedim(2, 0), gained.movedim(2, 0)
        return scan(step, torch.zeros_like(rows[0]), (decays, rows))[1].movedim(0, 2)

    def _at_once(self, last: Tensor, gained: Tensor) -> Tensor:
        total = last.cumsum(2)  # (B, H, chunks, D)
        gap = (total - last)[:, :, :, None] - total[:, :, None]
        earlier = torch.ones(gap.shape[2:4], dtype=torch.bool, device=gap.device).tril(-1)[..., None]
        weights = torch.where(earlier, gap, -torch.inf).exp()  # (B, H, chunks, chunks, D)
        return torch.einsum("bhijd,bhjde->bhide", weights, gained)


class Operator(nn.Module):
    """The same by ``gatecc::linear_attention``."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads = heads

    def forward(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
        """As `Chunks`."""
        q, k, v, g = (x.unflatten(-1, (self.heads, -1)).transpose(1, 2) for x in (q, k, v, g))
        y, _ = torch.ops.gatecc.linear_attention(q, k, v, g, scale=q.size(-1) ** -0.5)
        return y.transpose(1, 2).flatten(2)
