"""fold_into_next: move a constant factor of a value into the weight that reads it: it costs nothing at run time."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.printer import node_text
from gatecc.ir.program import fake
from gatecc.ir.weights import is_wrapped

_A = torch.ops.aten
# Operators through which a factor passes unchanged, on their first argument.
TRANSPARENT = frozenset(
    {
        _A.view.default, _A.reshape.default, _A._unsafe_view.default, _A.transpose.int, _A.permute.default,
        _A.contiguous.default, _A.clone.default, _A.flatten.using_ints, _A.unflatten.int, _A.squeeze.dim,
        _A.unsqueeze.default, _A.dropout.default, _A.slice.Tensor, _A.expand.default,
    }
)  # fmt: skip
WEIGHT_ARGUMENT: dict[Any, int] = {
    _A.linear.default: 1,
    _A.addmm.default: 2,
    _A.mm.default: 1,
    _A.matmul.default: 1,
    _A.conv2d.default: 1,
}


def fold_into_next(edit: Editor, value: fx.Node, factor: float) -> None:
    """Scale the weights of every linear that reads ``value``. Raises SiteRefusedError if something else reads it.

    The factor is a power of two, so that scaling the weight and scaling it back are exact.
    """
    if math.frexp(factor)[0] != 0.5:
        raise ArgumentError("only a power of two folds exactly", found=f"{factor}")
    for weight in _readers(edit, value):
        edit.scale_weight(edit.program.full_name(weight), factor)


def _readers(edit: Editor, value: fx.Node) -> list[str]:
    weights: list[str] = []
    todo = [value]
    while todo:
        node = todo.pop()
        for user in node.users:
            if user.target in TRANSPARENT and user.args[0] is node:
                todo.append(user)
                continue
            weights.append(_weight(edit, user, node))
    return list(dict.fromkeys(weights))


def _weight(edit: Editor, user: fx.Node, node: fx.Node) -> str:
    at = WEIGHT_ARGUMENT.get(user.target)
    weight = user.args[at] if at is not None and len(user.args) > at else None
    while isinstance(weight, fx.Node) and weight.target in (_A.t.default, _A.transpose.int):
        weight = weight.args[0]
    live = edit.program.weight(weight) if isinstance(weight, fx.Node) and weight is not node else None
    if isinstance(weight, fx.Node) and isinstance(live, torch.nn.Parameter) and not is_wrapped(live):
        tied = [n for n in weight.users if n is not user]
        if not tied:
            return str(edit.program.path(weight))
    kind = "a tensor" if fake(user) is not None else "a value"
    raise SiteRefusedError(
        "the factor of the gate cannot be folded into the next linear",
        where=f"{edit.site.owner} {edit.site.line}".strip(),
        found=f"{node_text(user)} reads {kind} that is gated"
        + (f" by a {type(live).__name__}, which is not scaled" if live is not None and is_wrapped(live) else ""),
        do='use init="identity" (2*sigmoid), which needs no folding',
    )
