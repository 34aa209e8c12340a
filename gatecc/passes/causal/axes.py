"""Axes of the values of a graph: which of them are one, and which operators tell the places of an axis apart.

An element-wise operator treats all places of an axis alike, and so does a product along the axes of its operands; one
that selects, cuts or counts along an axis does not. Axes are the same where a place of one is made of that place of the
other alone, or where they are summed up together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import fx

from gatecc.ir.match.product import product
from gatecc.ir.ops import CASTS, DROPOUTS, named, opname
from gatecc.ir.program import fake
from gatecc.ir.sizes import on_example

Axis = tuple[fx.Node, int]

ALIKE = (
    frozenset(
        "add sub rsub mul div true_divide neg reciprocal exp exp2 expm1 log log2 log1p log_sigmoid logsigmoid sigmoid "
        "softplus abs sign relu silu gelu elu tanh cos sin sqrt rsqrt square pow clamp clamp_min clamp_max minimum "
        "maximum lerp addcmul addcdiv where masked_fill bitwise_not logical_not bitwise_and logical_and bitwise_or "
        "logical_or ge gt le lt eq ne isinf isnan nan_to_num clone contiguous alias detach zeros_like ones_like "
        "full_like expand expand_as copy fill zero lift_fresh_copy".split()
    )
    | CASTS
    | DROPOUTS
)  # element by element, with broadcasting
_NEW = frozenset("zeros ones full new_zeros new_ones new_full scalar_tensor".split())  # of one number
_VIEWS = frozenset("view reshape _unsafe_view flatten unflatten".split())
_ALONG = frozenset(
    "cumsum cumprod logcumsumexp flip roll slice narrow softmax _softmax log_softmax repeat_interleave".split()
)  # along one axis
_SUMS = frozenset("sum mean amax amin logsumexp linalg_vector_norm".split())
_MOVES = frozenset("transpose permute unsqueeze select t mT".split())
_PRODUCTS = frozenset("matmul bmm mm addmm baddbmm linear einsum".split())
_LISTS = frozenset("split split_with_sizes chunk unbind".split())


class Axes:
    """Visit the nodes in order; ``root`` then tells axes apart."""

    def __init__(self) -> None:
        self._above: dict[Axis, Axis] = {}

    def root(self, axis: Axis) -> Axis:
        """One for all axes that are the same."""
        path: list[Axis] = []
        while (above := self._above.setdefault(axis, axis)) != axis:
            path.append(axis)
            axis = above
        for below in path:  # the next time it is near
            self._above[below] = axis
        return axis

    def roots(self) -> list[Axis]:
        """Those of all axes, in the order in which they were met."""
        return list(dict.fromkeys(self.root(axis) for axis in list(self._above)))

    def visit(self, node: fx.Node) -> set[Axis]:
        """The axes of a node and its inputs whose places the operator tells apart: all if it is not known."""
        for at in range(rank(node)):
            self.root((node, at))
        kept = self._rule(node)
        return {a for n in (node, *_tensors(node)) for a in _all(n)} if kept is None else kept

    def _rule(self, node: fx.Node) -> set[Axis] | None:
        name = opname(node)
        if node.op == "get_attr":
            return None  # a constant is as large as it is
        if node.op != "call_function" or name in _NEW or name in _LISTS:
            return set()
        if name in ALIKE:
            return None if name == "where" and len(node.args) < 3 else self._alike(node, _tensors(node))
        rule = next((rule for names, rule in _RULES if name in names), None)
        return None if rule is None else rule(self, node)

    def _same(self, one: Axis, other: Axis) -> set[Axis]:
        """Two axes are one, but where the value of a single place is repeated."""
        if size(one) == size(other):
            self._above[self.root(one)] = self.root(other)
        elif 1 not in (size(one), size(other)):
            return {one, other}
        return set()

    def _paired(self, pairs: Iterable[tuple[Axis, Axis]]) -> set[Axis]:
        return {axis for one, other in pairs for axis in self._same(one, other)}

    def _alike(self, node: fx.Node, inputs: Sequence[fx.Node]) -> set[Axis]:
        """Axes are counted from the last."""
        last = rank(node)
        return self._paired(
            ((given, at), (node, last - rank(given) + at)) for given in inputs for at in range(rank(given))
        )

    def _but(self, node: fx.Node, source: fx.Node, dims: Iterable[int]) -> set[Axis]:
        """The axes of one input stay where they are; the places of some are told apart."""
        special = {dim % rank(source) for dim in dims}
        rest = {*range(rank(source))} - special
        return {axis for at in special for axis in ((source, at), (node, at))} | self._paired(
            ((source, at), (node, at)) for at in rest
        )

    def _along(self, node: fx.Node) -> set[Axis] | None:
        if opname(node) == "flip":
            return self._but(node, _first(node), named(node, "dims"))
        dim = named(node, "dim", named(node, "dims"))
        dims = [dim] if isinstance(dim, int) else dim
        return self._but(node, _first(node), dims) if dims else None

    def _triangle(self, node: fx.Node) -> set[Axis]:
        return self._but(node, _first(node), (-2, -1))

    def _padded(self, node: fx.Node) -> set[Axis] | None:
        given = named(node, "pad")
        source, last = _first(node), rank(node)
        if named(node, "mode", "constant") != "constant":
            return None
        pairs = [given[i : i + 2] for i in range(0, len(given), 2)]
        return self._but(node, source, [last - 1 - i for i, pair in enumerate(pairs) if list(pair) != [0, 0]])

    def _repeated(self, node: fx.Node) -> set[Axis] | None:
        times, source = named(node, "repeats"), _first(node)
        if len(times) != rank(source):
            return None
        return self._but(node, source, [at for at, n in enumerate(times) if n != 1 and size((source, at)) != 1])

    def _normed(self, node: fx.Node) -> set[Axis]:
        over = len(named(node, "normalized_shape"))
        weights = {axis for n in _tensors(node)[1:] for axis in _all(n)}
        return weights | self._but(node, _first(node), range(-over, 0))

    def _summed(self, node: fx.Node) -> set[Axis] | None:
        """A sum treats all that it sums alike; a mean divides by their number, a maximum chooses."""
        source, dims = _first(node), named(node, "dim")
        if dims is None:
            return set() if opname(node) == "sum" else None
        count = rank(source)
        gone = {dim % count for dim in ([dims] if isinstance(dims, int) else dims or range(count))}
        stays = bool(named(node, "keepdim", False))
        axes = [None if at in gone else at for at in range(count) if stays or at not in gone]
        chosen = set[Axis]() if opname(node) == "sum" else {(source, at) for at in gone}
        return chosen | self._from(node, source, axes)

    def _from(self, node: fx.Node, source: fx.Node, axes: Sequence[int | None]) -> set[Axis]:
        """For each axis of a node, that of the source."""
        return self._paired(((source, of), (node, at)) for at, of in enumerate(axes) if of is not None)

    def _moved(self, node: fx.Node) -> set[Axis] | None:
        source, name = _first(node), opname(node)
        axes: list[int | None] = list(range(rank(source)))
        kept: set[Axis] = set()
        if name == "permute":
            axes = [dim % len(axes) for dim in named(node, "dims")]
        elif name == "unsqueeze":
            axes.insert(named(node, "dim") % rank(node), None)
        elif name == "select":
            dim = named(node, "dim") % len(axes)
            kept = {(source, dim)}
            del axes[dim]
        else:
            a, b = (named(node, "dim0"), named(node, "dim1")) if name == "transpose" else (-2, -1)
            if len(axes) > 1:
                axes[a], axes[b] = axes[b], axes[a]
        return kept | self._from(node, source, axes) if len(axes) == rank(node) else None

    def _view(self, node: fx.Node) -> set[Axis] | None:
        """Axes that stay by themselves; those that are split or merged are told apart."""
        source = _first(node)
        if rank(source) and not any(isinstance(x, list | tuple | int) for x in node.args[1:]):
            return None  # of the bits, as another dtype
        left, right = ([a for a in _all(n) if size(a) != 1] for n in (source, node))
        kept: set[Axis] = set()
        i = j = 0
        while i < len(left) and j < len(right):
            ends, products = [i + 1, j + 1], [size(left[i]), size(right[j])]
            while products[0] != products[1]:
                side = 0 if products[0] < products[1] else 1
                if ends[side] >= len((left, right)[side]):
                    return None
                products[side] *= size((left, right)[side][ends[side]])
                ends[side] += 1
            if ends == [i + 1, j + 1]:
                kept |= self._same(left[i], right[j])
            else:
                kept |= {*left[i : ends[0]], *right[j : ends[1]]}
            i, j = ends
        return kept

    def _multiplied(self, node: fx.Node) -> set[Axis] | None:
        found = product(node)
        if found is None:
            return None
        at = {letter: (node, i) for i, letter in enumerate(found.axes)}
        kept: set[Axis] = set()
        for given, letters in ((found.left, found.left_axes), (found.right, found.right_axes)):
            for i, letter in enumerate(letters):
                kept |= self._same((given, i), at.setdefault(letter, (given, i)))
        return kept if found.addend is None else kept | self._alike(node, [found.addend])

    def _joined(self, node: fx.Node) -> set[Axis] | None:
        """stack and cat: the places along their axis are told apart."""
        count, stacks = rank(node), opname(node) == "stack"
        dim = named(node, "dim", 0) % count
        kept: set[Axis] = {(node, dim)}
        for given in _tensors(node):
            if rank(given) != count - stacks:
                return None  # cat takes empty tensors of one axis
            kept |= set() if stacks else {(given, dim)}
            kept |= self._paired(((given, at - (stacks and at > dim)), (node, at)) for at in range(count) if at != dim)
        return kept

    def _listed(self, node: fx.Node) -> set[Axis] | None:
        """One of the tensors into which a value was cut along an axis."""
        cut = _first(node)
        if opname(cut) not in _LISTS:
            return None
        source = _first(cut)
        dim = named(cut, "dim", 0) % rank(source)
        if opname(cut) != "unbind":
            return self._but(node, source, [dim])
        return {(source, dim)} | self._from(node, source, [at for at in range(rank(source)) if at != dim])


_RULES: tuple[tuple[frozenset[str], Callable[[Axes, fx.Node], set[Axis] | None]], ...] = (
    (_ALONG, Axes._along),
    (_SUMS, Axes._summed),
    (_MOVES, Axes._moved),
    (_VIEWS, Axes._view),
    (_PRODUCTS, Axes._multiplied),
    (frozenset(("stack", "cat")), Axes._joined),
    (frozenset(("getitem",)), Axes._listed),
    (frozenset(("tril", "triu")), Axes._triangle),
    (frozenset(("pad", "constant_pad_nd")), Axes._padded),
    (frozenset(("repeat",)), Axes._repeated),
    (frozenset(("layer_norm", "rms_norm")), Axes._normed),
)


def rank(node: fx.Node) -> int:
    """The number of axes of what a node holds, 0 if it holds no tensor."""
    held = fake(node)
    return 0 if held is None else held.dim()


def size(axis: Axis) -> int:
    """On the example."""
    return on_example(axis[0].meta["val"].shape[axis[1]]) or 0


def listed(node: fx.Node) -> fx.Node:
    """The tensor that a list of tensors was cut from, else the node itself."""
    return _first(node) if opname(node) in _LISTS else node


def _tensors(node: fx.Node) -> list[fx.Node]:
    return [n for n in map(listed, node.all_input_nodes) if fake(n) is not None]


def _all(node: fx.Node) -> list[Axis]:
    return [(node, at) for at in range(rank(node))]


def _first(node: fx.Node) -> Any:
    return node.args[0]
