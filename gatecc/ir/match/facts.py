"""Facts: what all matchers want to know about the nodes of a program, computed once in time linear in the graph."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any, TypedDict

from torch import fx

from gatecc.ir.axes import Axes
from gatecc.ir.dataflow import Flow
from gatecc.ir.match.maps import LinearMaps, Map
from gatecc.ir.match.nonlinearity import Nonlinearity, nonlinearities
from gatecc.ir.match.projection import LINEAR_OPS, Projection, computed, projection
from gatecc.ir.ops import CONTRACTIONS, SOFTMAXES, argument, opname
from gatecc.ir.program import Program, fake, origin, shape
from gatecc.ir.site import Refusal, Value
from gatecc.ir.sizes import same

_MIXING = CONTRACTIONS | SOFTMAXES | frozenset("embedding embedding_bag grouped_mm_fallback".split())
_LAST = frozenset("layer_norm rms_norm embedding".split())  # the features are last
_SECOND = frozenset(
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution "
    "batch_norm group_norm instance_norm".split()
)  # the features are second, after the batch
_NORMS = frozenset("layer_norm rms_norm batch_norm group_norm instance_norm".split())
_STARTS = _LAST | _SECOND | frozenset(LINEAR_OPS) | {"einsum"}
_PERMUTES = frozenset("permute transpose t mT movedim swapaxes swapdims".split())
_SPLITS = frozenset("split split_with_sizes chunk tensor_split".split())
_REGROUPS = frozenset("view reshape _unsafe_view flatten unflatten view_as reshape_as".split())


class Place(TypedDict):
    """The fields of a site that say where it is."""

    owner: str
    ordinal: int
    call: int
    line: str


class Facts:
    """What is known of the nodes.

    ``order``: the position of a node. ``inputs``: those of its inputs whose values matter. ``data``: nodes that depend
    on the values of an input of the program. ``projections``: the products with a weight, by node, in order.
    ``whole``: likewise, but adapters count as part of the projection that they stand beside, and computed weights too.
    ``refused``: what looks like one. ``source``: the weighted operation that a value was last mixed by; nodes that
    differ by element-wise operations and views only share it. ``channel``: the axis that holds the features, where that
    is known. ``nonlinearities``: by the node they end in.
    """

    def __init__(self, program: Program) -> None:
        self.flow = Flow(program)
        self.program = program
        self.order = self.flow.order
        self.data = self.flow.data
        self.inputs = self.flow.inputs
        self.maps = LinearMaps(self.flow)
        self.projections: dict[fx.Node, Projection] = {}
        self.whole: dict[fx.Node, Projection] = {}
        self.refused: list[Refusal] = []
        self.source: dict[fx.Node, fx.Node] = {}
        self.channel: dict[fx.Node, int] = {}
        self._places: Counter[tuple[str, str, int]] = Counter()
        for node in program.calls():
            self._visit(node)
        self.nonlinearities: dict[fx.Node, Nonlinearity] = nonlinearities(list(program.calls()))

    def place(self, kind: str, node: fx.Node, owner: str | None = None) -> Place:
        """The place of a new site at ``node``; sites of one kind, owner and call are numbered as they are asked for."""
        at = origin(node)
        owner = at.owner if owner is None else owner
        key = (kind, owner, at.call)
        self._places[key] += 1
        return Place(owner=owner, ordinal=self._places[key] - 1, call=at.call, line=at.line)

    def value(self, node: fx.Node, like: fx.Node | None = None) -> Value:
        """The node with its axes named, as those of ``like``, a node of its shape, where nothing else says."""
        channel = self.channel.get(node, self.channel.get(like) if like is not None else None)
        return Value(node, Axes.of_features(len(shape(node)), channel))

    def _visit(self, node: fx.Node) -> None:
        found = projection(self.program, node, self.data)
        if isinstance(found, Projection):
            self.projections[node] = found
        elif found is not None:
            self.refused.append(found)
        whole = self._whole(node)
        if whole is not None:
            self.whole[node] = whole
        self._find_source(node)
        self._tell_input(node)
        axis = self._find_channel(node)
        if axis is not None:
            self.channel[node] = axis

    def is_sum_of_equals(self, node: fx.Node) -> bool:
        """Whether a node adds the products of modules of one standing, such as two heads."""
        found = self.maps.maps.get(node)
        return found is not None and found.equals

    def _whole(self, node: fx.Node) -> Projection | None:
        found = self.maps.maps.get(node)
        if found is not None:
            return self._sum(found)
        if node in self.maps.part_of:
            return None
        alone = self.projections.get(node) or computed(node, self.data)
        if alone is None:
            return None
        if alone.weight is None and alone.out is node:
            alone = replace(alone, out=self.maps.settled(node))
        entry = self.maps.entered(alone.x, alone.owner.rpartition(".")[0])
        return alone if entry is alone.x else replace(alone, x=entry, inp=entry)

    def _sum(self, found: Map) -> Projection | None:
        """A sum of products with weights as one projection."""
        main = self.projections.get(found.main) or computed(found.main, self.data)
        if main is None:
            return None
        root = self.maps.entered(found.root, main.owner.rpartition(".")[0])
        return replace(main, node=found.end, x=root, inp=root, out=found.out, weight=None)

    def _find_source(self, node: fx.Node) -> None:
        if node not in self.data:
            return
        if opname(node) in _MIXING:
            self.source[node] = node
            return
        sources = {self.source[n] for n in self.inputs[node] if n in self.source}
        if sources:
            self.source[node] = next(iter(sources)) if len(sources) == 1 else node

    def _tell_input(self, node: fx.Node) -> None:
        """What a layer reads has its features where the layer takes them, if nothing before says where: an input."""
        name = opname(node)
        projection = self.projections.get(node)
        x = projection.x if projection else node.args[0] if name in _STARTS and node.args else None
        held = fake(x) if isinstance(x, fx.Node) and x in self.data and x not in self.channel else None
        if held is None or not held.is_floating_point() or (projection is None and name not in _NORMS):
            return
        assert isinstance(x, fx.Node)
        second = projection.conv if projection else name in _SECOND
        if held.dim() > 1:
            self.channel[x] = 1 if second else held.dim() - 1

    def _find_channel(self, node: fx.Node) -> int | None:
        name = opname(node)
        read = self.inputs[node]
        if name == "getitem" and isinstance(node.args[0], fx.Node) and opname(node.args[0]) in _SPLITS:
            read = self.inputs[node.args[0]]
        known = [n for n in read if n in self.channel]
        held = fake(node) if known or name in _STARTS else None
        if held is None:
            return None
        rank = held.dim()
        if node in self.projections and not self.projections[node].conv:
            # On a transposed input a Linear mixes tokens, and the features stay where they are (MLP-Mixer).
            return self.channel.get(self.projections[node].x, rank - 1)
        if name in _LAST:
            return rank - 1
        if name in _SECOND:
            return 1 if rank > 1 else None
        if not known:
            return None
        first = max(known, key=lambda n: len(shape(n))) if len(known) > 1 else known[0]
        axis, old = self.channel[first], shape(first)
        if name in _PERMUTES:
            return _permuted(node, name, axis, len(old))
        if name in _REGROUPS:
            return _regrouped(old, tuple(held.shape), axis)
        if name in ("matmul", "mm"):
            return self._behind_weight(node, rank)
        if name in ("bmm", "einsum", "scaled_dot_product_attention"):
            return None
        return axis if len(old) == rank else _resized(node, name, axis, len(old), rank)

    def _behind_weight(self, node: fx.Node, rank: int) -> int | None:
        """``weight @ x`` maps the axis before the last of x (Mamba's time steps), which holds the features or tokens:
        either way they stay where they are. None for any other product."""
        weight, x = node.args[:2]
        if weight in self.data or not isinstance(weight, fx.Node) or not isinstance(x, fx.Node) or x not in self.data:
            return None
        fits = len(shape(weight)) == 2 and len(shape(x)) == rank >= 2
        return self.channel.get(x) if fits else None


def _permuted(node: fx.Node, name: str, axis: int, rank: int) -> int | None:
    if name == "t" and rank == 2:
        return 1 - axis
    if name == "mT":
        return {rank - 1: rank - 2, rank - 2: rank - 1}.get(axis, axis)
    if name == "permute":
        order = [d % rank for d in argument(node, 1, "dims", [])]
        return order.index(axis)
    if name == "movedim":
        return None
    one, two = (d % rank for d in node.args[1:3] if isinstance(d, int))
    return {one: two, two: one}.get(axis, axis)


def _regrouped(old: tuple[Any, ...], new: tuple[Any, ...], axis: int) -> int | None:
    """Where an axis stands after a reshape: it is last on both sides, or all axes up to it are kept."""
    if axis == len(old) - 1 and new and same(old[-1], new[-1]):
        return len(new) - 1
    if axis < len(new) and all(map(same, old[: axis + 1], new[: axis + 1])):
        return axis
    return None


def _resized(node: fx.Node, name: str, axis: int, old: int, new: int) -> int | None:
    """Where an axis stands after one axis is taken out or put in."""
    dim = argument(node, 1, "dim")
    if name not in ("select", "squeeze", "unsqueeze", "mean", "sum", "amax", "amin") or abs(old - new) != 1:
        return None
    dim = dim[0] if isinstance(dim, (list, tuple)) and len(dim) == 1 else dim
    if not isinstance(dim, int):
        return None
    if new > old:
        return axis + (dim % new <= axis)
    dim %= old
    return None if dim == axis else axis - (dim < axis)
