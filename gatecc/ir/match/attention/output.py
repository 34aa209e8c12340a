"""The projection that reads the heads, and the value that it ends in once adapters beside it are added."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.maps import LinearMaps, module_apart
from gatecc.ir.match.projection import Projection, weighted
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, RESHAPES, VIEWS, opname
from gatecc.ir.program import origin
from gatecc.ir.sizes import node_shape, same

_AFTER = VIEWS | CASTS | DROPOUTS | frozenset("mul layer_norm rms_norm batch_norm sigmoid relu gelu silu div".split())


def find_output(heads: fx.Node, features: int, flow: Flow, maps: LinearMaps, within: str) -> Projection | None:
    """The projection that reads the heads, through views, gates and norms; it must read all ``features`` of them.

    With adapters beside it, its node is the one that their sum ends in, and no one weight makes it. ``within`` is the
    owner of the attention.
    """
    queue, seen = deque([heads]), {heads}
    while queue and len(seen) < 40:
        node = queue.popleft()
        for user in sorted(node.users, key=flow.order.__getitem__):
            if user in seen:
                continue
            seen.add(user)
            made = weighted(user, flow) if opname(user) in CONTRACTIONS else None
            if made is not None and made.x is node and _reads(made, features):
                return _whole(made, maps, within)
            if opname(user) in _AFTER or _enters(user, maps, within):
                queue.append(user)
    return None


def _whole(made: Projection, maps: LinearMaps, within: str) -> Projection:
    found = maps.around(made.node)
    module = module_apart(origin(made.node).owner, within)
    if found is not None:
        out = maps.left(found.out, module)
        return replace(made, node=out, x=found.root, weight=None)
    out = maps.left(maps.settled(made.node), module)
    return made if out is made.node else replace(made, node=out)


def _enters(node: fx.Node, maps: LinearMaps, within: str) -> bool:
    """Whether a product with weights runs in a module beside the attention's own: OFT turns what a projection reads."""
    return opname(node) == "einsum" and maps.is_product(node) and module_apart(origin(node).owner, within) != ""


def _reads(made: Projection, features: int) -> bool:
    shape = node_shape(made.x) or ()
    width = shape[made.channels] if shape else 0
    if opname(made.node) == "einsum":
        return True
    return not features or same(width, features)


def unflattened(node: fx.Node, forward: bool) -> fx.Node:
    """Step from a matrix (tokens, channels) over a reshape to the tensor with its own token axes."""
    if len(node_shape(node) or ()) != 2:
        return node
    if forward:
        users = [u for u in node.users if opname(u) in RESHAPES]
        return users[0] if len(users) == 1 and len(node.users) == 1 else node
    source = node.args[0] if opname(node) in RESHAPES else None
    return source if isinstance(source, fx.Node) else node
