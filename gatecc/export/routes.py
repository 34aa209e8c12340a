"""Routes: how many of the choices that a graph makes another one makes as well."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import torch

from gatecc.codegen.onnx.build import Graph
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.runtime import Session


def routes(
    call: Call, graph: Graph, before: Path, after: Path, samples: Sequence[Sequence[torch.Tensor]]
) -> dict[str, float]:
    """The share of what each TopK chooses (experts of a token, say) that is chosen in the second file, too."""
    chosen = {str(n.outputs[1].name): str(n.name) for n in graph.model.graph if n.op_type == "TopK"}
    chosen.pop("", None)
    if not chosen:
        return {}
    same, all_ = dict.fromkeys(chosen, 0), dict.fromkeys(chosen, 0)
    with (
        closing(Session(before, graph.places, apart=graph.apart, values=list(chosen))) as one,
        closing(Session(after, graph.places, apart=graph.apart, values=list(chosen))) as other,
    ):
        for leaves in samples:
            first, second = (dict(zip(s.names, s.run(call.inputs, leaves), strict=True)) for s in (one, other))
            for name in chosen:
                x, y = first[name], second[name]
                same[name] += int((x[..., None] == y[..., None, :]).any(-1).sum())
                all_[name] += x.numel()
    return {node: same[name] / max(all_[name], 1) for name, node in chosen.items()}
