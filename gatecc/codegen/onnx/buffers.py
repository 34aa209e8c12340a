"""buffers: states that a runtime may hold with room for more tokens than there are: no size may be read off them.

torch.onnx takes a size from whichever input has it; the number of tokens so far must come from the mask.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

WRITER = "GroupQueryAttention"  # writes new keys and values into the buffer that it is given
_AXIS, _RANK = 2, 4  # of the tokens in keys and values


def count_by_mask(graph: ir.Graph, mask: str, tokens: str) -> None:
    """Let every size along the tokens that is read off keys and values be the length of the mask without the new
    tokens."""
    values = {str(value.name): value for value in graph.inputs}
    for value in graph.inputs:
        if any(node.op_type == WRITER for node in value.consumers()):
            for node in [n for n in value.consumers() if n.op_type == "Shape"]:
                _replace(graph, node, value, values[mask], values[tokens])


def is_buffer(output: Any) -> bool:
    """Whether an output may be the buffer of the input that it continues: nothing else reads that."""
    node = output.producer()
    if node is None or node.op_type != WRITER:
        return False
    past = node.inputs[3 + node.outputs.index(output) - 1]
    return all(reader is node or _measures_samples(reader) for reader in past.consumers())


def _measures_samples(node: Any) -> bool:
    return node.op_type == "Shape" and _AXIS not in range(*_bounds(node))


def _bounds(node: Any) -> tuple[int, int]:
    """The axes of which a Shape gives the sizes."""
    start, end = (node.attributes[name].value if name in node.attributes else None for name in ("start", "end"))
    first, last, _ = slice(start, end).indices(_RANK)
    return first, last


def _replace(graph: ir.Graph, node: Any, value: Any, mask: Any, tokens: Any) -> None:
    import onnx_ir as ir

    start, end = _bounds(node)
    if not start <= _AXIS < end:
        return
    made: list[Any] = []

    def add(op: str, inputs: list[Any], size: int, **attributes: int) -> Any:
        name = f"{node.outputs[0].name}.{len(made)}"  # a dot: values are numbered by underscores
        made.append(ir.node(op, inputs, attributes, name=name))
        result = made[-1].outputs[0]
        result.name, result.type, result.shape = name, ir.TensorType(ir.DataType.INT64), ir.Shape([size])
        return result

    total, new = (add("Shape", [x], 1, start=1, end=2) for x in (mask, tokens))
    parts = [add("Sub", [total, new], 1)]
    if start < _AXIS:
        parts.insert(0, add("Shape", [value], _AXIS - start, start=start, end=_AXIS))
    if end > _AXIS + 1:
        parts.append(add("Shape", [value], end - _AXIS - 1, start=_AXIS + 1, end=end))
    whole = parts[0] if len(parts) == 1 else add("Concat", parts, end - start, axis=0)
    graph.insert_before(node, made)
    ir.convenience.replace_all_uses_with(node.outputs[0], whole)
    graph.remove(node, safe=True)
