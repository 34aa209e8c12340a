"""concatenate: a branch beside the channels of a value, whose reading Linears get columns for it."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.ops import CASTS, DROPOUTS, opname
from gatecc.ir.program import origin, shape
from gatecc.ir.site import Site, Value
from gatecc.ir.sizes import expression
from gatecc.ir.widen import Rows
from gatecc.passes.operands import place, readers

_PASSED = (
    CASTS | DROPOUTS | frozenset(("contiguous", "clone", "alias"))
)  # what may stand between a value and its reader


def concatenate(value: Value, branch: fx.Node, stage: str, zero: bool, edit: Editor) -> None:
    """Let the readers of a value read ``[value, branch]``, which they must be able to: Linears.

    The new columns of their weights are 0, or random where the branch is ``zero`` itself: both at 0 would not learn.
    Raises SiteRefusedError for a reader that is no Linear, or whose weight others read as well.
    """
    site = edit.site
    old, new = (expression(shape(node)[-1]) for node in (value.node, branch))
    if value.axes[-1] != "c" or not old.is_Integer or not new.is_Integer:
        raise _refused(site, f"a value with the axes {value.axes}", "fixed numbers of channels, as the last axis")
    columns = Rows(1, int(old), int(new), axis=1)
    for operand, linears in _linears(value.node, stage, edit).items():
        joined = edit.call(beside, operand, branch, name="joined")
        for linear in linears:
            edit.widen_input(linear, joined, columns, partial(_columns, int(shape(linear)[-1]), columns, zero))


def beside(value: Tensor, branch: Tensor) -> Tensor:
    """value: (..., C), branch: (..., C') or what broadcasts to it -> (..., C + C')."""
    return torch.cat([value, branch.to(value.dtype).expand(*value.shape[:-1], -1)], -1)


def _columns(rows: int, columns: Rows, zero: bool) -> Tensor:
    """The values of new columns, (O, C')."""
    made, bound = torch.zeros(rows, columns.new), (columns.old + columns.new) ** -0.5
    return made.uniform_(-bound, bound) if zero else made


def _linears(value: fx.Node, stage: str, edit: Editor) -> dict[fx.Node, list[fx.Node]]:
    """The Linears that read a value, by the node of their operand: the value, or a cast or dropout of it."""
    chosen = readers(edit.site, stage)
    found: dict[fx.Node, list[fx.Node]] = {}
    stack = [(value, user) for user in value.users if chosen is None or user in chosen]
    while stack:
        operand, user = stack.pop()
        if user in edit.inserted:
            continue
        if opname(user) in _PASSED:
            stack.extend((user, after) for after in user.users)
        elif user.target is torch.ops.aten.linear.default and user.args[0] is operand:
            found.setdefault(operand, []).append(user)
        else:
            what = "an output of the model" if user.op == "output" else f"{user.name} = {user.target}"
            raise _refused(edit.site, f"it is read by {what} {origin(user).owner}".strip(), "readers that are Linears")
    if not found:
        raise _refused(edit.site, "nothing reads it", "readers that are Linears")
    return found


def _refused(site: Site, found: str, expected: str) -> SiteRefusedError:
    return SiteRefusedError(
        "a branch cannot be concatenated to this value",
        where=place(site),
        found=found,
        expected=expected,
        do='merge with op="add", or select a value that Linears alone read: mlp[...].hidden',
    )
