"""Region: a function of tensors as a graph of few operators, and over which space each of its values runs.

The space has rows and columns: columns are the last axis, rows all others. A value runs over both (a tile), over rows
(column), over columns (row), or over none (scalar).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from gatecc.codegen.regions.expressions import NAMES, UnprintableError
from gatecc.ir.ops import opname

Kind = Literal["tile", "column", "row", "scalar"]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
REDUCTIONS = ("sum", "mean", "amax", "amin", "var", "var_mean")
ALIASES = (
    "alias",
    "detach",
    "clone",
    "expand",
    "view",
    "_unsafe_view",
    "reshape",
    "unsqueeze",
    "squeeze",
    "lift_fresh_copy",
)
CASTS = ("_to_copy", "convert_element_type", "to")
CONSTANTS = ("full", "full_like", "zeros_like", "ones_like", "scalar_tensor", "zeros", "ones")
PRODUCTS = ("mm", "addmm")
TRANSPOSES = ("t", "permute", "transpose")
_WIDEST, WIDEST_PRODUCT = 16384, 256  # columns of a row that a program holds, and of one that it multiplies


def decompositions() -> dict[Any, Any]:
    """What is taken apart: the operators that core ATen leaves whole although they are pointwise and reductions."""
    aten = torch.ops.aten
    whole = (aten.native_layer_norm, aten._softmax, aten._log_softmax, aten.silu, aten.addmm)
    whole += (aten.native_layer_norm_backward, aten._softmax_backward_data, aten._log_softmax_backward_data)
    whole += (aten.gelu_backward, aten.silu_backward, aten.log_sigmoid_backward, aten.hardswish, aten.mish)
    table = {**core_aten_decompositions(), **get_decompositions(list(whole))}
    table.pop(aten.addmm.default, None)
    return table


class RefusedError(Exception):
    """Why a region becomes no kernel."""


@dataclass(frozen=True, eq=False)
class Region:
    """``graph``: placeholders are the tensors that it reads, its output the flat tuple of results.

    rows: the sizes of the leading axes; products: its products of matrices. ``notes``: what it computes, in words, for
    the header of its file; ``source``: the graph that is differentiated, if it is another one.
    """

    graph: fx.Graph
    rows: tuple[int, ...]
    products: tuple[fx.Node, ...] = ()
    notes: tuple[str, ...] = field(default=())
    source: fx.Graph | None = None

    @property
    def inputs(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    @property
    def outputs(self) -> tuple[fx.Node, ...]:
        return tuple(self.graph.output_node().args[0])  # pyright: ignore[reportArgumentType]

    @property
    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def leader(self) -> fx.Node:
        """An input that has all rows, in as many axes as there is one: from it their numbers are read."""
        there = [n for n in self.inputs if rows_of(shape(n)[:-1], self.rows) == "all"]
        return max(there, key=lambda n: len(shape(n)))

    @property
    def width(self) -> int:
        """Columns of the space. Of products that follow each other, those of the last."""
        return (
            shape(self.products[-1])[-1]
            if self.products
            else max(shape(n)[-1] for n in self.inputs if shape(n) and n.users)
        )


def shape(node: fx.Node) -> tuple[int, ...]:
    """Of a node's value."""
    return tuple(node.meta["val"].shape)


def dtype(node: fx.Node) -> torch.dtype:
    """Of a node's value."""
    return node.meta["val"].dtype


def same_elements(node: fx.Node) -> fx.Node:
    """What a node is a view of, as long as that has the same columns."""
    while node.op == "call_function" and name_of(node) in ALIASES and name_of(node) != "expand":
        given: Any = node.args[0]
        if shape(given)[-1:] != shape(node)[-1:]:
            break
        node = given
    return node


def name_of(node: fx.Node) -> str:
    """What a node calls, without its overload."""
    return "getitem" if "getitem" in str(node.target) else opname(node)


def region_of(function: Callable[..., Any], example: Sequence[Tensor], notes: Sequence[str] = ()) -> Region:
    """The region that a function of tensors is. Raises RefusedError with the reason if no kernel can be printed."""

    def flat(*given: Tensor) -> tuple[Tensor, ...]:
        found = function(*given)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    # A tensor that is given twice would be traced as one input.
    example = [torch.empty_like(x) if any(x is y for y in example[:i]) else x for i, x in enumerate(example)]
    # softmax is differentiated as one operator: through its parts, the gradient of the largest score would be added.
    table = decompositions()
    aten = torch.ops.aten
    softmax = {op: table.pop(op) for op in (aten._softmax.default, aten._log_softmax.default)}
    with torch.no_grad():
        source = _traced(flat, table, example)
        parts = any(n.target in softmax for n in source.graph.nodes)
        graph = _traced(source, table | softmax, example).graph if parts else source.graph
    for node, name in zip([n for n in graph.nodes if n.op == "placeholder"], _letters(example), strict=True):
        node.name = name
        node.target = name
    return replace(checked(graph, tuple(notes)), source=source.graph)


def _traced(function: Callable[..., Any], table: dict[Any, Any], example: Sequence[Tensor]) -> fx.GraphModule:
    made = make_fx(
        torch.func.functionalize(function, remove="mutations"), decomposition_table=table, tracing_mode="fake"
    )(*example)
    made.graph.eliminate_dead_code()
    return made


def _letters(example: Sequence[Tensor]) -> list[str]:
    return [f"x{i}" for i in range(len(example))]


def checked(graph: fx.Graph, notes: tuple[str, ...]) -> Region:
    products = tuple(n for n in graph.nodes if n.op == "call_function" and name_of(n) in PRODUCTS)
    for node in graph.nodes:
        check_node(node)
    outputs = graph.output_node().args[0]
    if not isinstance(outputs, tuple) or not all(isinstance(n, fx.Node) and n.op == "call_function" for n in outputs):
        raise RefusedError("a result that is an input, or no tensor")
    rows = _rows(graph, products)
    region = Region(graph, rows, products, notes)
    if not any(rows_of(shape(n)[:-1], rows) == "all" for n in region.inputs):
        raise RefusedError("no input has all rows of the results")
    most = WIDEST_PRODUCT if products else _WIDEST
    if reduces_behind(region) and region.width > most:
        raise RefusedError(f"rows of {region.width} columns are reduced, a program holds {most}")
    return region


def reduces_behind(region: Region) -> bool:
    """Whether rows of results are reduced: behind the products, if there are any."""
    return any(name_of(n) in REDUCTIONS for n in ancestors(region.outputs, upto=region.products))


def ancestors(nodes: Iterable[fx.Node], upto: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The nodes and all that they are computed from; nothing that lies before one of ``upto``."""
    found, left = set[fx.Node](), list(nodes)
    while left:
        node = left.pop()
        if node not in found:
            found.add(node)
            left += () if node in upto else node.all_input_nodes
    return found


def _rows(graph: fx.Graph, products: Sequence[fx.Node]) -> tuple[int, ...]:
    """The leading sizes of the space, with as many axes as a value has."""
    shapes = _shapes(graph)
    if products:
        widths = {w for p in products for w in (shape(p.args[-2])[-1], shape(p)[-1])}  # pyright: ignore[reportArgumentType]
        return leading_sizes(graph, shape(products[0])[0], widths)
    widest = max((s[-1] for s in shapes), default=0)
    return leading_sizes(graph, max((math.prod(s[:-1]) for s in shapes if s[-1] == widest), default=0), {widest})


def leading_sizes(graph: fx.Graph, total: int, widths: set[int]) -> tuple[int, ...]:
    """Those of the values that have so many rows and one of these widths, with as many axes as one has."""
    if min(widths) < 2 or total < 2:
        raise RefusedError("no space of several rows and columns")
    return max((s[:-1] for s in _shapes(graph) if s[-1] in widths and math.prod(s[:-1]) == total), key=len)


def _shapes(graph: fx.Graph) -> list[tuple[int, ...]]:
    tensors = [n for n in graph.nodes if n.users and isinstance(n.meta.get("val"), Tensor)]
    return [shape(n) for n in tensors if len(shape(n)) > 1]


def check_node(node: fx.Node) -> None:
    """Raises RefusedError for a node that no kernel computes."""
    if node.op == "get_attr":
        raise RefusedError("a constant tensor that is no input")
    value = node.meta.get("val")
    if node.op == "placeholder" and (not isinstance(value, Tensor) or value.dtype not in (*FLOATS, torch.bool)):
        raise RefusedError(f"an input of {getattr(value, 'dtype', type(value).__name__)}")
    if node.op != "call_function":
        return
    name = name_of(node)
    known = name in NAMES or name in (*REDUCTIONS, *ALIASES, *CASTS, *CONSTANTS, *PRODUCTS, *TRANSPOSES, "getitem")
    if not known:
        raise RefusedError(f"{name} is not in the table of expressions")
    if isinstance(value, Tensor) and value.dtype not in (*FLOATS, torch.bool):
        raise RefusedError(f"{name} in {value.dtype}")
    if name in REDUCTIONS:
        _check_reduction(node, name)


def _check_reduction(node: fx.Node, name: str) -> None:
    given: Any
    given, axes = (*node.args, None)[:2]
    rank = len(shape(given))
    if not isinstance(axes, list | tuple) or [a % rank for a in axes if isinstance(a, int)] != [rank - 1]:
        raise RefusedError(f"{name} over other axes than the last")


def rows_of(lead: tuple[int, ...], rows: tuple[int, ...]) -> Literal["all", "none", "some", "other"]:
    """Over which rows a value with these leading sizes runs."""
    if lead == rows or lead == (math.prod(rows),):
        return "all"
    if all(size == 1 for size in lead):
        return "none"
    padded = (1,) * (len(rows) - len(lead)) + lead
    if len(lead) <= len(rows) and all(a in (1, b) for a, b in zip(padded, rows, strict=True)):
        return "some"
    return "other"


__all__ = ["RefusedError", "Region", "UnprintableError", "region_of"]
