"""Clean: names as the model has them, and nothing in the graph that tells on which machine it was made."""

from __future__ import annotations

import re
from itertools import count
from typing import TYPE_CHECKING, Any

from gatecc.codegen.onnx.dims import Dims
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.marks import WEIGHT

if TYPE_CHECKING:
    import onnx_ir as ir

_NUMBER = re.compile(r"(?<=.)_\d+$")


def hold_constants(graph: ir.Graph) -> None:
    """Enter the constants that nodes read and the graph does not hold: torch.onnx gives the bounds of two clamps of one
    value the same names, and the graph keeps the first."""
    held = {id(v) for v in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.inputs:
            if value is None or value.producer() is not None or value.const_value is None or id(value) in held:
                continue
            name = str(value.name)
            while name in graph.initializers:
                name += "_"
            value.name = name
            graph.initializers.add(value)
            held.add(id(value))


def name_ends(graph: ir.Graph, call: Call) -> None:
    """Give inputs and outputs the names of the call; what bears one of them inside the graph gets another.

    torch.onnx would let an output that is called ``mul`` share its name with a product.
    """
    taken = {*call.inputs, *call.outputs}
    ends = {id(v) for v in (*graph.inputs, *graph.outputs)}
    inside = [v for n in graph.all_nodes() for v in n.outputs if id(v) not in ends]
    inside += [v for v in graph.initializers.values() if id(v) not in ends]
    names = {v.name for v in inside}
    for value in inside:
        if value.name in taken:
            new = f"{value.name}_"
            while new in names or new in taken:
                new += "_"
            names.add(new)
            value.name = new
    for i, value in enumerate((*graph.inputs, *graph.outputs)):
        value.name = f"gatecc_end_{i}"  # first out of the way: one may bear the name of another
    for value, name in zip((*graph.inputs, *graph.outputs), (*call.inputs, *call.outputs), strict=True):
        value.name = name


def clean(model: ir.Model, dims: Dims) -> None:
    """Drop traces of the machine and of what it traced before, name dims and weights as the model does."""
    graph = model.graph
    model.doc_string = graph.doc_string = None
    model.metadata_props.clear()
    graph.metadata_props.clear()
    for name, value in list(graph.initializers.items()):
        if name.startswith("m."):
            del graph.initializers[name]
            value.name, value.meta[WEIGHT] = name.removeprefix("m."), True
            graph.initializers.add(value)
    for node in graph.all_nodes():
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            _clean_value(value, dims)
    for value in (*graph.inputs, *graph.initializers.values()):
        _clean_value(value, dims)
    _number(graph)


def _number(graph: ir.Graph) -> None:
    """Number the values of nodes by their order: torch's own numbers depend on what it traced before, and the same
    model would be other bytes the second time."""
    inside = list(graph.all_nodes())
    graphs = {id(graph): graph, **{id(n.graph): n.graph for n in inside if n.graph is not None}}
    kept = {id(v) for v in graph.outputs}
    names = {v.name for each in graphs.values() for v in (*each.inputs, *each.initializers.values())}
    names |= {v.name for v in graph.outputs}
    numbers: dict[str, count[int]] = {}
    for value in (v for n in inside for v in n.outputs if v.name and id(v) not in kept):
        base = _NUMBER.sub("", str(value.name))
        numbered = (f"{base}_{i}" if i else base for i in numbers.setdefault(base, count()))
        value.name = next(name for name in numbered if name not in names)
        names.add(value.name)


def _clean_value(value: ir.Value, dims: Dims) -> None:
    import onnx_ir as ir

    value.metadata_props.clear()
    value.doc_string = None
    if value.shape is not None:
        value.shape = ir.Shape([_size(d, dims) for d in value.shape])


def _size(size: Any, dims: Dims) -> int | str | None:
    """A size that is unknown stays so: of sizes of one name a runtime takes it that they are equal."""
    if isinstance(size, int) or size.value is None:
        return size if isinstance(size, int) else None
    return dims.rename(str(size.value))
