"""Weights: what is computed from weights alone (turned, joined, 1 + weight) is a weight itself.

torch.onnx folds small ones. Here no copy is made before the file is written: a tensor that is evaluated then takes the
node's place.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import onnx_ir as ir

Compute = Callable[..., Any]


def _transposed(node: ir.Node) -> Compute:
    perm = node.attributes.get("perm")
    axes = None if perm is None else tuple(perm.as_ints())
    return lambda x: np.transpose(x, axes)


def _joined(node: ir.Node) -> Compute:
    axis = node.attributes["axis"].as_int()
    return lambda *parts: np.concatenate(parts, axis)


_FORMS: dict[str, Callable[[ir.Node], Compute]] = {
    "Transpose": _transposed,
    "Concat": _joined,
    "Add": lambda node: np.add,
    "Mul": lambda node: np.multiply,
    "Sub": lambda node: np.subtract,
    "Neg": lambda node: np.negative,
    "Reshape": lambda node: lambda x, shape: x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(shape)]),
    "Identity": lambda node: lambda x: x,
}
_SAME_SIZE = frozenset(("Transpose", "Reshape", "Identity", "Neg"))


def fold_weights(model: ir.Model) -> None:
    """Put weights in the place of nodes that read weights alone."""
    for node in list(model.graph):
        if node.domain or node.op_type not in _FORMS or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
            continue
        held = [constant(v) for v in node.inputs]
        if held and all(h is not None for h in held) and _is_worth(node, held):
            _fold(model.graph, node, held)


def constant(value: ir.Value | None) -> Any:
    """The tensor that a value always has; None if it is computed."""
    if value is None or value.is_graph_input():
        return None
    return value.const_value if value.producer() is None or value.producer().op_type == "Constant" else None  # pyright: ignore[reportOptionalMemberAccess]


def _is_worth(node: ir.Node, held: Sequence[Any]) -> bool:
    """Whether the file does not grow: a weight that others read as it is stays, and is turned when the graph runs."""
    if node.op_type not in ("Transpose", "Concat"):
        return True
    sources = [v for v in node.inputs if v is not None]
    alone = all(len(_readers(v)) == 1 or v.const_value is None or v.const_value.nbytes < 4096 for v in sources)
    return alone or sum(h.nbytes for h in held) < 4096


def _readers(value: ir.Value) -> set[Any]:
    """What reads a value; equal nodes count once."""
    return {(n.op_type, str(sorted(n.attributes.items(), key=str)), i) for n, i in value.uses()}


def _fold(graph: ir.Graph, node: ir.Node, held: Sequence[Any]) -> None:
    import onnx_ir as ir

    out, compute = node.outputs[0], _FORMS[node.op_type](node)
    if out.dtype is None or out.shape is None or not all(isinstance(d, int) for d in out.shape):
        return
    name = _named(graph, node)
    known = graph.initializers.get(name)
    if known is None:

        def evaluate() -> Any:
            return ir.Tensor(compute(*(h.numpy() for h in held)), name=name)

        shape = ir.Shape([int(d) for d in out.shape])  # pyright: ignore[reportArgumentType]
        tensor = ir.LazyTensor(evaluate, dtype=out.dtype, shape=shape, name=name)
        known = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(out.dtype))
        graph.initializers.add(known)
    out.replace_all_uses_with(known)
    graph.remove(node, safe=True)


def _named(graph: ir.Graph, node: ir.Node) -> str:
    """``model.layers.0.self_attn.q_proj.weight.T``; of several the first, with the number of them."""
    first = str(next(v.name for v in node.inputs if v is not None))
    perm = node.attributes.get("perm")
    suffix = "T" if node.op_type == "Transpose" else f"{node.op_type.lower()}{len(node.inputs)}"
    if perm is not None and list(perm.as_ints()) != [1, 0]:
        suffix += "".join(map(str, perm.as_ints()))
    name = f"{first}.{suffix}"
    if node.op_type != "Transpose":
        while name in graph.initializers:
            name += "_"
    return name
