"""Weights: what is computed from weights alone (turned, taken apart, joined, 1 + weight) is a weight itself.

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


def _apart(node: ir.Node) -> Compute:
    """Parts of the sizes that are given, or of one size, the last one smaller."""
    axis, count = node.attributes["axis"].as_int(), len(node.outputs)

    def parts(x: Any, sizes: Any = None) -> Any:
        one = -(-x.shape[axis] // count)
        ends = [one * i for i in range(1, count)] if sizes is None else np.cumsum(sizes)[:-1]
        return np.split(x, ends, axis)

    return parts


_FORMS: dict[str, Callable[[ir.Node], Compute]] = {
    "Transpose": _transposed,
    "Concat": _joined,
    "Split": _apart,
    "Squeeze": lambda node: lambda x, *axes: np.squeeze(x, *map(tuple, axes)),
    "Unsqueeze": lambda node: lambda x, axes: np.expand_dims(x, tuple(axes)),
    "Add": lambda node: np.add,
    "Mul": lambda node: np.multiply,
    "Sub": lambda node: np.subtract,
    "Neg": lambda node: np.negative,
    "Reshape": lambda node: lambda x, shape: x.reshape([x.shape[i] if s == 0 else s for i, s in enumerate(shape)]),
    "Identity": lambda node: lambda x: x,
}


def fold_weights(model: ir.Model) -> None:
    """Put weights in the place of nodes that read weights alone; equal nodes share theirs."""
    made: dict[Any, list[ir.Value]] = {}
    for node in list(model.graph):
        if node.domain or node.op_type not in _FORMS or any(value.is_graph_output() for value in node.outputs):
            continue
        held = [constant(v) for v in node.inputs]
        if not held or any(h is None for h in held) or not _is_worth(node, held) or not _is_settled(node):
            continue
        key = (node.op_type, str(sorted(node.attributes.items(), key=str)), *map(id, node.inputs))
        if key not in made:
            made[key] = _folded(model.graph, node, held)
        for out, known in zip(node.outputs, made[key], strict=True):
            out.replace_all_uses_with(known)
        model.graph.remove(node, safe=True)


def constant(value: ir.Value | None) -> Any:
    """The tensor that a value always has; None if it is computed."""
    if value is None or value.is_graph_input():
        return None
    return value.const_value if value.producer() is None or value.producer().op_type == "Constant" else None  # pyright: ignore[reportOptionalMemberAccess]


def _is_worth(node: ir.Node, held: Sequence[Any]) -> bool:
    """Whether the file does not grow: a weight that others read as it is stays, and is turned when the graph runs."""
    if node.op_type not in ("Transpose", "Concat", "Split"):
        return True
    sources = [v for v in node.inputs if v is not None]
    alone = all(len(_readers(v)) == 1 or v.const_value is None or v.const_value.nbytes < 4096 for v in sources)
    return alone or sum(h.nbytes for h in held) < 4096


def _readers(value: ir.Value) -> set[Any]:
    """What reads a value; equal nodes count once."""
    return {(n.op_type, str(sorted(n.attributes.items(), key=str)), i) for n, i in value.uses()}


def _is_settled(node: ir.Node) -> bool:
    """Whether dtype and sizes of its results are known."""
    sizes = [None if v.dtype is None or v.shape is None else list(v.shape) for v in node.outputs]
    return all(s is not None and all(isinstance(d, int) for d in s) for s in sizes)


def _folded(graph: ir.Graph, node: ir.Node, held: Sequence[Any]) -> list[ir.Value]:
    """New initializers, which are computed when the file is written."""
    compute, name = _FORMS[node.op_type](node), _named(graph, node)
    if len(node.outputs) == 1:
        return [_initializer(graph, name, node.outputs[0], lambda: compute(*(h.numpy() for h in held)))]

    def part(number: int) -> Callable[[], Any]:
        return lambda: compute(*(h.numpy() for h in held))[number]

    return [_initializer(graph, f"{name}.{i}", out, part(i)) for i, out in enumerate(node.outputs)]


def _initializer(graph: ir.Graph, name: str, out: ir.Value, compute: Callable[[], Any]) -> ir.Value:
    import onnx_ir as ir

    assert out.dtype is not None
    assert out.shape is not None
    shape = ir.Shape([int(d) for d in out.shape])  # pyright: ignore[reportArgumentType]
    tensor = ir.LazyTensor(lambda: ir.Tensor(compute(), name=name), dtype=out.dtype, shape=shape, name=name)
    known = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(out.dtype))
    graph.initializers.add(known)
    return known


def _named(graph: ir.Graph, node: ir.Node) -> str:
    """``model.layers.0.self_attn.q_proj.weight.T``; of several the first, with the number of them."""
    first = str(next(v.name for v in node.inputs if v is not None))
    perm = node.attributes.get("perm")
    suffix = "T" if node.op_type == "Transpose" else f"{node.op_type.lower()}{len(node.inputs)}"
    if perm is not None and list(perm.as_ints()) != [1, 0]:
        suffix += "".join(map(str, perm.as_ints()))
    name = f"{first}.{suffix}"
    while any(known == name or known.startswith(f"{name}.") for known in graph.initializers):
        name += "_"
    return name
