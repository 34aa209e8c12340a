"""functional: operators that write into their operand, as those that do not, where nobody can tell the difference."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.ir.ops import VIEWS, mutates, opname


def functional(nodes: Collection[fx.Node]) -> None:
    """``x.add_(y)`` as ``x + y``, where x is a tensor of its own that nothing reads behind it, nor a view of it."""
    for node in nodes:
        plain = _plain(node)
        x = node.args[0] if node.args else None
        if plain is None or not isinstance(x, fx.Node) or x.op != "call_function" or opname(x) in VIEWS:
            continue
        if not _read_later(x, node):
            node.target = plain


def _plain(node: fx.Node) -> OpOverload | None:
    """The operator that computes the same without writing: ``add_`` is ``add`` with the same arguments."""
    target = node.target
    if not mutates(node) or not isinstance(target, OpOverload) or not target._opname.endswith("_"):
        return None
    packet = getattr(getattr(torch.ops, target.namespace), target._opname[:-1], None)
    found = getattr(packet, target._overloadname, None)
    if not isinstance(found, OpOverload) or found._schema.is_mutable:
        return None
    one, other = ([(a.name, str(a.type)) for a in op._schema.arguments] for op in (target, found))
    return found if one == other else None


def _read_later(x: fx.Node, writer: fx.Node) -> bool:
    """Whether a reader of a tensor, or of a view of it, comes behind the one that writes to it."""
    return any(
        user is not writer and (user > writer or (opname(user) in VIEWS and _read_later(user, writer)))
        for user in x.users
    )
