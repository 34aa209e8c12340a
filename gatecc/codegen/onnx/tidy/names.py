"""Names: a node is called after the module that runs it, and what it does there."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from torch import fx

if TYPE_CHECKING:
    import onnx_ir as ir


def name_nodes(model: ir.Model) -> None:
    """``model.layers.0.mlp.up_proj/MatMul``; of several of one name the second is ``..._1``."""
    seen: Counter[str] = Counter()
    for node in model.graph.all_nodes():
        source = node.meta.get("node")
        owner = _owner(source) if isinstance(source, fx.Node) else ""
        name = f"{owner}/{node.op_type}" if owner else node.op_type
        node.name = f"{name}_{seen[name]}" if seen[name] else name
        seen[name] += 1


def _owner(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    owner = next((str(path) for path, _ in reversed(list(stack.values()))), "")
    return "" if owner == "m" or owner.startswith("_empty_") else owner.removeprefix("m.")
