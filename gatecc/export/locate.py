"""Locate: the first node of an ONNX graph that does not compute what the model does.

Lowerings fuse, fold and rename, so that few values have a partner that a name would find. They are told by their
numbers: a value of the graph agrees if some value of the captured model has the same entries, in any layout. A value
from which any later one agrees is right, or does not matter. The first node of one from which none does is to blame.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from gatecc.codegen.onnx.build import MODEL, Graph, write
from gatecc.codegen.onnx.leaves import Call
from gatecc.codegen.onnx.runtime import Session
from gatecc.errors import ExportError
from gatecc.scope.family import difference

_FEW = 8  # entries: sizes and scalars agree by chance
_SMALLEST = 1e-6
_MANY = 1 << 24  # differences of rows
_AXES = 5  # of a tensor whose layouts are tried
_SHARES = (0.01, 0.1)  # of the difference that was found: less is rounding on the way ...
_ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-5, torch.float16: 2e-3}  # ... and so is this, up to the larger one


@dataclass(frozen=True)
class OnnxNode:
    """A node of the graph, as far as it matters here."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def locate(error: ExportError, call: Call, graph: Graph, path: Path, leaves: Sequence[Tensor]) -> ExportError:
    """The error with the first differing node in what was found; as it was if that cannot be said."""

    def expected() -> list[Tensor]:
        torch.manual_seed(0)
        return list(call.flat(*leaves))

    return with_place(error, lambda: first_difference(graph, path, call.inputs, leaves, expected()))


def with_place(error: ExportError, place: Callable[[], str]) -> ExportError:
    """The error with this in what was found, as it was if that fails: the error matters more than its place."""
    try:
        found = place()
    except Exception:
        return error
    found = f"{error.found}; {found}" if found else error.found
    return ExportError(error.what, where=error.where, found=found, expected=error.expected, do=error.do)


def first_difference(
    graph: Graph,
    path: Path,
    inputs: Sequence[str],
    leaves: Sequence[Tensor],
    expected: Sequence[Tensor] | None = None,
) -> str:
    """Which node of the file it is, and where in the model it comes from, in words.

    ``inputs`` and ``leaves``: what the file is given, first of all the inputs of the captured program. ``expected``:
    what its first outputs should be, by default what the program computes.
    """
    nodes = [_plain(n) for n in graph.model.graph]
    wanted = [name for node in nodes for name in node.outputs]
    with (
        without_functions(graph, path) as plain,
        closing(Session(plain, graph.places, apart=graph.apart, values=wanted)) as session,
    ):
        every = session.run(inputs, leaves)
    known, results = values(graph, leaves)
    expected = results if expected is None else expected
    found = dict(zip(session.names, every, strict=True))
    errors = [_gap(x.cpu(), y) for x, y in zip(expected, every, strict=False)]
    worst = max(errors, default=0.0)
    if not worst > 0:
        return "no node differs when each value is an output: ONNX Runtime's own optimisation is at fault"
    ends = [v.name for v in graph.model.graph.outputs if v.name]
    least, most = (share * worst for share in _SHARES)
    rounding = max((_ROUNDING.get(x.dtype, 0.0) for x in expected), default=0.0)
    guilty = first_differing(nodes, found, known, min(most, max(least, rounding)), ends)
    if guilty is None:
        return "no single node is to blame"
    place = graph.places.get(guilty.name, "")
    return f"the first node that differs is {guilty.operator} {guilty.name}" + (f" of {place}" if place else "")


@contextmanager
def without_functions(graph: Graph, path: Path) -> Generator[Path]:
    """The file ``path``, or one of the same graph in which every value can be looked at."""
    if not graph.functions:
        yield path
        return
    with tempfile.TemporaryDirectory(dir=path.parent.parent, prefix=".gatecc-") as folder:
        write(replace(graph, functions=False), Path(folder))
        yield Path(folder) / MODEL


def _plain(node: Any) -> OnnxNode:
    inside = [v.name for a in node.attributes.values() for v in _read_inside(a)]
    inputs = tuple(v.name for v in node.inputs if v is not None)
    return OnnxNode(node.name or "", node.op_type, (*inputs, *inside), tuple(v.name for v in node.outputs if v.name))


def _read_inside(attribute: Any) -> Iterator[Any]:
    """What the graphs of a branch or a loop read."""
    graphs = [attribute.value] if attribute.type.name == "GRAPH" else []
    for graph in graphs:
        for node in graph.all_nodes():
            yield from (v for v in node.inputs if v is not None)


# --- values -----------------------------------------------------------------------------------------------------------


class _Recording(fx.Interpreter):
    """Keeps what every node gives."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.kept: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.kept += [x.detach().cpu().clone() for x in pytree.tree_leaves(value) if isinstance(x, Tensor)]
        return value


def values(graph: Graph, leaves: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Every tensor that the captured model computes for these inputs, before anything was put in its ONNX form; and
    its outputs. What is left over of the inputs is none of its own."""
    module = graph.program().module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    recording = _Recording(module)
    own = len(module.graph.find_nodes(op="placeholder"))
    with torch.no_grad():
        results = recording.run(*leaves[:own])
    return recording.kept, [x for x in pytree.tree_leaves(results) if isinstance(x, Tensor)]


def first_differing(
    nodes: Sequence[OnnxNode],
    found: Mapping[str, Tensor],
    known: Sequence[Tensor],
    limit: float,
    ends: Collection[str] = (),
) -> OnnxNode | None:
    """The first node, in the order of the graph, one of whose results is wrong: of floats, or else of integers.

    A result is right if it agrees with a known value within ``limit``, or if a node that reads it gives something
    right; integers (which experts were chosen, a length) tell of floats only where nothing else does, for they are
    right as long as an error is small. Each is judged by itself: attention may be wrong and the keys that it hands on
    right. One that nobody reads counts if the node has no other.
    """
    readers: dict[str, list[OnnxNode]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    right: set[str] = set()

    def tells(name: str) -> bool:
        made = [n for r in readers.get(name, ()) for n in r.outputs]
        floats = [n for n in made if (n in readers or n in ends) and n in found and found[n].is_floating_point()]
        return not right.isdisjoint(floats if floats and name in found and found[name].is_floating_point() else made)

    for node in reversed(nodes):
        for name in node.outputs:
            x = found.get(name)
            if tells(name) or (x is not None and any(f(x, known, limit) for f in (_agrees, _in_pieces, _in_rows))):
                right.add(name)
    for floating in (True, False):  # an index without a partner is seen in what it fetches, which is wrong anyway
        for node in nodes:
            judged = [n for n in node.outputs if n in readers or n in ends] or node.outputs
            wrong = (found[n] for n in judged if n in found and n not in right)
            if any(x.numel() >= _FEW and x.is_floating_point() is floating for x in wrong):
                return node
    return None


def _agrees(x: Tensor, others: Sequence[Tensor], limit: float) -> bool:
    like = (y for y in others if y.numel() == x.numel() and y.is_floating_point() == x.is_floating_point())
    return x.numel() >= _FEW and any(_same(x, y, limit) for y in like)


def _in_pieces(x: Tensor, known: Sequence[Tensor], limit: float) -> bool:
    """Whether known values lie side by side in it, along the last axis: the results of products that were packed."""
    width = x.shape[-1] if x.dim() > 1 else 0
    rows = x.numel() // width if width else 0
    if not 0 < rows * 2 <= x.numel():
        return False
    parts = [y.reshape(rows, -1) for y in known if y.dim() > 1 and y.numel() == rows * y.shape[-1] < x.numel()]
    parts = [y for y in parts if y.is_floating_point() == x.is_floating_point() and y.numel() >= _FEW]
    flat, at = x.reshape(rows, width), 0
    while at < width:
        fitting = (y.shape[1] for y in parts if at + y.shape[1] <= width)
        of_width = {n: flat[:, at : at + n] for n in set(fitting)}
        found = (y for y in parts if y.shape[1] in of_width and _gap(of_width[y.shape[1]], y) <= limit)
        at += next((y.shape[1] for y in found), width + 1)
    return at == width


def _in_rows(x: Tensor, known: Sequence[Tensor], limit: float) -> bool:
    """Whether each of its rows is a row of some known value: tokens of one expert, which a Split has taken out."""
    if x.dim() != 2 or x.numel() < _FEW or not x.is_floating_point():
        return False
    x = x.double()
    least = limit * max(float(x.abs().max()), _SMALLEST)
    for y in known:
        if y.dim() > 1 and y.shape[-1] == x.shape[1] > 1 and y.is_floating_point() and y.numel() > x.numel():
            rows = y.double().reshape(-1, x.shape[1])
            if len(x) * rows.numel() <= _MANY and bool(((x[:, None] - rows).abs().amax(-1).amin(1) <= least).all()):
                return True
    return False


def _same(x: Tensor, y: Tensor, limit: float) -> bool:
    """Whether they have the same entries, up to the order of axes."""
    if _gap(x.flatten(), y.flatten()) <= limit:
        return True
    if _gap(*(z.double().nan_to_num().square().mean().sqrt() for z in (x, y))) > limit:
        return False  # no layout changes this
    if x.dim() == 2 and x.shape == y.shape and _gap(_by_rows(x), _by_rows(y)) <= limit:
        return True
    return any(_gap(one, other.flatten()) <= limit for one, other in _layouts(x, y))


def _by_rows(x: Tensor) -> Tensor:
    """Tokens in an order of their own: those of one expert stand in any order."""
    return x[x.double().sum(1).argsort()]


def _layouts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in ((x.squeeze(), y), (y.squeeze(), x)):
        if 2 <= one.dim() <= _AXES:
            yield from ((one.permute(order).flatten(), other) for order in permutations(range(one.dim())))


def _gap(x: Tensor, y: Tensor) -> float:
    """Relative to the largest entry, however small that is."""
    return difference(x, y, floor=_SMALLEST)
