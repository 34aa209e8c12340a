"""Locate: the first node of an ONNX graph that does not compute what the model does.

Lowerings fuse, fold and rename, so that few values have a partner that a name would find. They are told by their
numbers: a value of the graph agrees if some value of the captured model has the same entries, in any layout. A node
from which any later value agrees is right, or does not matter. The first node from which none does is the one to blame.
"""

from __future__ import annotations

import tempfile
from collections.abc import Generator, Iterator, Mapping, Sequence
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
_AXES = 5  # of a tensor whose layouts are tried
_SHARE = 0.1  # of the difference that was found: less is rounding on the way


@dataclass(frozen=True)
class OnnxNode:
    """A node of the graph, as far as it matters here."""

    name: str
    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def locate(error: ExportError, call: Call, graph: Graph, path: Path, leaves: Sequence[Tensor]) -> ExportError:
    """The error with the first differing node in what was found; as it was if that cannot be said."""
    try:
        found = first_difference(call, graph, path, leaves)
    except Exception:  # the error itself matters more than its place
        return error
    return ExportError(
        error.what, where=error.where, found=f"{error.found}; {found}", expected=error.expected, do=error.do
    )


def first_difference(call: Call, graph: Graph, path: Path, leaves: Sequence[Tensor]) -> str:
    """Which node of the file it is, and where in the model it comes from, in words."""
    nodes = [_plain(n) for n in graph.model.graph]
    wanted = [name for node in nodes for name in node.outputs]
    with (
        _without_functions(graph, path) as plain,
        closing(Session(plain, graph.places, apart=graph.apart, values=wanted)) as session,
    ):
        every = session.run(call.inputs, leaves)
    outputs, found = every[: len(call.outputs)], dict(zip(session.names, every, strict=True))
    torch.manual_seed(0)
    expected = [x.cpu() for x in call.flat(*leaves)]
    errors = [_gap(x, y) for x, y in zip(expected, outputs, strict=True)]
    worst = max(errors, default=0.0)
    if not worst > 0:
        return "no node differs when each value is an output: ONNX Runtime's own optimisation is at fault"
    known = values(graph, leaves)
    guilty = first_differing(nodes, found, known, _SHARE * worst)
    if guilty is None:
        return "no single node is to blame"
    place = graph.places.get(guilty.name, "")
    return f"the first node that differs is {guilty.operator} {guilty.name}" + (f" of {place}" if place else "")


@contextmanager
def _without_functions(graph: Graph, path: Path) -> Generator[Path]:
    """The file, or one of the same graph in which every value can be looked at."""
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


def values(graph: Graph, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Every tensor that the captured model computes for these inputs, before anything was put in its ONNX form."""
    module = graph.program().module(check_guards=False)
    assert isinstance(module, fx.GraphModule)
    recording = _Recording(module)
    with torch.no_grad():
        recording.run(*leaves)
    return recording.kept


def first_differing(
    nodes: Sequence[OnnxNode], found: Mapping[str, Tensor], known: Sequence[Tensor], limit: float
) -> OnnxNode | None:
    """The first node, in the order of the graph, from which no value agrees with a known one within ``limit``."""
    by_count: dict[int, list[Tensor]] = {}
    for tensor in known:
        by_count.setdefault(tensor.numel(), []).append(tensor)
    readers: dict[str, list[OnnxNode]] = {}
    for node in nodes:
        for name in node.inputs:
            readers.setdefault(name, []).append(node)
    right: set[str] = set()
    for node in reversed(nodes):
        held = [found[name] for name in node.outputs if name in found]
        later = any(r.outputs[0] in right for name in node.outputs for r in readers.get(name, ()))
        if later or any(x.numel() >= _FEW and _agrees(x, by_count.get(x.numel(), ()), limit) for x in held):
            right.update(node.outputs)
    for node in nodes:
        if node.outputs[0] not in right and any(found[n].numel() >= _FEW for n in node.outputs if n in found):
            return node
    return None


def _agrees(x: Tensor, others: Sequence[Tensor], limit: float) -> bool:
    return any(_same(x, y, limit) for y in others if x.is_floating_point() == y.is_floating_point())


def _same(x: Tensor, y: Tensor, limit: float) -> bool:
    """Whether they have the same entries, up to the order of axes."""
    if _gap(x.flatten(), y.flatten()) <= limit:
        return True
    if _gap(*(z.double().nan_to_num().square().mean().sqrt() for z in (x, y))) > limit:
        return False  # no layout changes this
    return any(_gap(one, other.flatten()) <= limit for one, other in _layouts(x, y))


def _layouts(x: Tensor, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    for one, other in ((x.squeeze(), y), (y.squeeze(), x)):
        if 2 <= one.dim() <= _AXES:
            yield from ((one.permute(order).flatten(), other) for order in permutations(range(one.dim())))


def _gap(x: Tensor, y: Tensor) -> float:
    """Relative to the largest entry, however small that is."""
    return difference(x, y, floor=_SMALLEST)
