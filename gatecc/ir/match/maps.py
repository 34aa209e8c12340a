"""Linear maps that several operators spell together: ``W x + s B (A x)`` and its like.

Adapters (LoRA, DoRA, VeRA, LoKr, ...) put further products with weights beside a projection, or in front of it (OFT,
IA3). What attention or an MLP reads and yields is then the whole map: the stream that all of its products start from,
and the sum that they end in. Found by following every value back to what it is a linear function of, token by token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, RESHAPES, SAME_SHAPE, argument, opname
from gatecc.ir.program import origin
from gatecc.ir.sizes import node_shape, same

_PRODUCTS = CONTRACTIONS - {"scaled_dot_product_attention", "_grouped_mm", "dot", "mv", "addmv", "inner", "bilinear"}
_WEIGHT_ON_RIGHT = frozenset("matmul bmm mm linalg_matmul".split())
_SCALED = CASTS | DROPOUTS | SAME_SHAPE | RESHAPES | frozenset("mul div neg add sub sum embedding".split())
_LINKS = 12  # steps that a value is followed back


@dataclass(frozen=True, eq=False)
class Map:
    """``end`` is a linear function of ``root`` for each token alone: the sum of several products with weights.

    ``main`` is the product that reads the root most directly, ``out`` the end after the casts that belong to it.
    ``equals``: modules of the same standing are summed (two heads), none of them an adapter of another.
    """

    root: fx.Node
    main: fx.Node
    end: fx.Node
    out: fx.Node
    equals: bool


@dataclass(frozen=True, eq=False)
class _Link:
    """A value is linear in ``node``, through ``products`` products with weights, the last of them ``product``."""

    node: fx.Node
    products: int
    product: fx.Node | None


class LinearMaps:
    """``maps``: by the sum that they end in, the outermost ones alone. ``part_of``: the map that a node lies inside."""

    def __init__(self, flow: Flow) -> None:
        self._flow = flow
        self._links: dict[fx.Node, tuple[_Link, ...]] = {}
        self.maps: dict[fx.Node, Map] = {}
        self.part_of: dict[fx.Node, Map] = {}
        for node in flow.program.calls():
            if node in flow.data:
                self._visit(node)

    def around(self, node: fx.Node) -> Map | None:
        """The outermost map that a node is a part or the end of."""
        return self.maps.get(node) or self.part_of.get(node)

    def entered(self, node: fx.Node, module: str) -> fx.Node:
        """The value that enters a module, where only linear steps inside it lie between it and ``node``."""
        current = node
        for link in self._links.get(node, ()) if module else ():
            if not inside(origin(current).owner, module):
                break
            current = link.node
        return node if inside(origin(current).owner, module) or not _same_places(current, node) else current

    def kept(self, node: fx.Node, outer: str) -> fx.Node:
        """The value before steps of ``outer``'s children that leave it as it is.

        Where nothing is dropped or cast, capture records the readers of a value as readers of its last such step,
        though that runs in an adapter beside them.
        """
        while self._keeps(node) and inside(origin(node).owner, outer) and origin(node).owner != outer:
            node = self._links[node][0].node
        return node

    def settled(self, end: fx.Node) -> fx.Node:
        """What a product ends in: after the bias that its module adds and the casts that are its only readers."""
        node = end
        while len(node.users) == 1:
            user = next(iter(node.users))
            own = origin(user).owner == origin(end).owner
            if not own or not (opname(user) in CASTS or self._adds_bias(user)):
                break
            node = user
        return node

    def left(self, end: fx.Node, module: str) -> fx.Node:
        """The value that leaves a module, where only linear steps inside it lie between it and ``end``."""
        node = end
        while module and len(node.users) == 1:
            user = next(iter(node.users))
            links = self._links.get(user, ())
            if not links or links[0].node is not node or not inside(origin(user).owner, module):
                break
            node = user
        return end if any(inside(origin(u).owner, module) for u in node.users) else node

    def _adds_bias(self, node: fx.Node) -> bool:
        if opname(node) not in ("add", "sub") or node not in self._links:
            return False
        others = [n for n in node.all_input_nodes if n is not self._links[node][0].node]
        shape = node_shape(others[0]) if others else None
        return shape is not None and sum(not same(size, 1) for size in shape) == 1

    def uncast(self, node: fx.Node) -> fx.Node:
        """The value before casts: autocast makes one for each product that reads it."""
        while opname(node) in CASTS and node in self._links:
            node = self._links[node][0].node
        return node

    def is_product(self, node: fx.Node) -> bool:
        """Whether a node multiplies one value that depends on inputs with weights, however these are computed."""
        links = self._links.get(node, ())
        return bool(links) and links[0].products == 1

    # --- one sweep ----------------------------------------------------------------------------------------------------

    def _visit(self, node: fx.Node) -> None:
        data = [n for n in self._flow.inputs[node] if n in self._flow.data]
        if len(data) == 2 and opname(node) in ("add", "sub"):
            self._join(node, *data)
        elif len(data) == 1:
            product = _multiplies(node, data[0])
            if product or _scales(node, data[0]):
                self._links[node] = tuple(self._behind(node, data[0], product))

    def _behind(self, node: fx.Node, source: fx.Node, product: bool) -> Iterator[_Link]:
        made = node if product else None
        yield _Link(source, int(product), made)
        for link in self._links.get(source, ())[: _LINKS - 1]:
            yield _Link(link.node, link.products + product, link.product or made)

    def _join(self, node: fx.Node, one: fx.Node, other: fx.Node) -> None:
        left, right = self._links.get(one, ()), {link.node: link for link in self._links.get(other, ())}
        if one in right or any(link.node is other for link in left):
            return  # a residual: the one is computed from the other
        pair = next(((a, right[a.node]) for a in left if a.products and _weighed(right, a.node)), None)
        if pair is None or not _token_by_token(node, pair[0]):
            return
        direct = min(pair, key=lambda link: (link.products, self._flow.order[_product(link)]))
        inner = self._between(node, direct.node)
        main = _product(direct)
        found = Map(direct.node, main, node, self.settled(node), _are_equals(node, pair))
        for part in inner:
            self.maps.pop(part, None)
            self.part_of[part] = found
        self.maps[node] = found
        rest = self._links.get(direct.node, ())
        self._links[node] = (
            _Link(direct.node, 1, main),
            *(_Link(link.node, link.products + 1, link.product or main) for link in rest[: _LINKS - 1]),
        )

    def _between(self, end: fx.Node, root: fx.Node) -> set[fx.Node]:
        seen: set[fx.Node] = set()
        stack = [end]
        while stack:
            for source in self._flow.inputs[stack.pop()]:
                if source in self._flow.data and source is not root and source not in seen:
                    seen.add(source)
                    stack.append(source)
        return seen

    def _keeps(self, node: fx.Node) -> bool:
        """Whether a node yields its input as it is: a dropout that is off, a cast to the dtype that it has."""
        if node not in self._links:
            return False
        if opname(node) in DROPOUTS:
            return not argument(node, 2, "train")
        source = self._links[node][0].node
        held, before = node.meta.get("val"), source.meta.get("val")
        return opname(node) in CASTS and held is not None and before is not None and held.dtype == before.dtype


def _product(link: _Link) -> fx.Node:
    assert link.product is not None
    return link.product


def _are_equals(end: fx.Node, links: tuple[_Link, _Link]) -> bool:
    """Whether both products read the root themselves, in modules of their own beside the sum's."""
    owners = {origin(_product(link)).owner for link in links} | {origin(end).owner}
    return len(owners) == 3 and all(link.products == 1 for link in links)


def _weighed(links: dict[fx.Node, _Link], node: fx.Node) -> bool:
    return node in links and links[node].products > 0


def _multiplies(node: fx.Node, data: fx.Node) -> bool:
    """Whether a node is the product of a value with weights, on the value's last axis."""
    name = opname(node)
    if name == "embedding":
        return argument(node, 1, "indices") is data
    if name not in _PRODUCTS:
        return False
    if name in _WEIGHT_ON_RIGHT:
        return node.args[0] is data
    if name in ("addmm", "baddbmm", "addbmm"):
        return node.args[1] is data
    return _keeps_places(node, data) if name == "einsum" else node.args[0] is data


def _keeps_places(node: fx.Node, data: fx.Node) -> bool:
    """Whether an einsum of two operands changes the last axis of the value alone."""
    terms, _, result = str(node.args[0]).replace(" ", "").partition("->")
    operands, letters = node.args[1], terms.split(",")
    if not isinstance(operands, list | tuple) or len(operands) != 2 or len(letters) != 2:
        return False
    own = letters[list(operands).index(data)]
    return bool(own) and result.startswith(own[:-1]) and own[-1] not in result


def _scales(node: fx.Node, data: fx.Node) -> bool:
    """Whether a node is an affine function of each token: a constant factor or summand, a cast, a dropout."""
    name = opname(node)
    if name not in _SCALED:
        return False
    if name in ("mul", "div") and (node.args[0] is node.args[1] or (name == "div" and node.args[0] is not data)):
        return False
    if name == "sum":
        return 0 not in {int(d) for d in argument(node, 1, "dim") or [0]}
    return name != "embedding"


def _same_places(one: fx.Node, other: fx.Node) -> bool:
    left, right = node_shape(one), node_shape(other)
    if left is None or right is None or len(left) != len(right):
        return False
    return all(map(same, left[:-1], right[:-1])) or all(map(same, left, right))


def _token_by_token(end: fx.Node, link: _Link) -> bool:
    """Whether the end has the root's places; channels come last, or second after a convolution."""
    root, made = node_shape(link.node), node_shape(end)
    if root is None or made is None:
        return False
    if opname(_product(link)) == "embedding":
        return len(made) == len(root) + 1 and all(map(same, root, made))
    if opname(_product(link)).startswith("conv"):
        return len(made) == len(root)
    return len(made) == len(root) and all(map(same, root[:-1], made[:-1]))


# --- modules ----------------------------------------------------------------------------------------------------------


def inside(owner: str, module: str) -> bool:
    return not module or owner == module or owner.startswith(module + ".")


def shared_module(one: str, other: str) -> str:
    """The innermost module that holds both."""
    common: list[str] = []
    for a, b in zip(one.split("."), other.split("."), strict=False):
        if a != b:
            break
        common.append(a)
    return ".".join(common)


def module_apart(owner: str, other: str) -> str:
    """The outermost module around ``owner`` that does not hold ``other``; "" if there is none."""
    shared = shared_module(owner, other)
    rest = owner[len(shared) :].lstrip(".") if shared else owner
    return ".".join(part for part in (shared, rest.partition(".")[0]) if part) if rest else ""
