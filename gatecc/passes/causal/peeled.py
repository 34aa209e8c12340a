"""What stands before the operands of a proved formula, or behind its result, that the operator does itself.

Constant factors are its scale, a logsigmoid its gate activation; and what was padded to whole chunks and cut again need
not be padded: no token reads a later one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from torch import fx

from gatecc.ir.ops import named, opname
from gatecc.ir.program import shape
from gatecc.ir.sizes import same
from gatecc.passes.causal.parts import Part
from gatecc.passes.causal.roles import Formula, Operand

_ALL = 2**31  # where slices that go to the end say so
_WHOLE = frozenset(("alias", "contiguous"))


def peeled(part: Part, formula: Formula) -> tuple[Part, Formula]:
    """The same with less around it; ``out`` of the part is what the formula then yields."""
    part, formula = _unpadded(part, formula)
    scale = formula.scale
    rows = {"q": formula.q, "k": formula.k} | ({} if formula.v is None else {"v": formula.v})
    for role, operand in rows.items():
        if role == "k" and formula.beta is not None:
            continue  # a delta rule is not linear in its keys
        source, factor = _unscaled(operand.node)
        scale *= factor
        rows[role] = replace(operand, node=source)
    return part, _activated(replace(formula, **rows, scale=scale))


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    """Without constant factors, and their product."""
    factor = 1.0
    while opname(node) in ("mul", "div") and not node.kwargs and len(node.args) == 2:
        one, number = node.args
        if opname(node) == "mul" and isinstance(one, int | float):
            one, number = number, one
        if not isinstance(one, fx.Node) or not isinstance(number, int | float) or not number or not _alike(one, node):
            break
        factor *= number if opname(node) == "mul" else 1 / number
        node = one
    return node, factor


def _alike(one: fx.Node, other: fx.Node) -> bool:
    return one.meta["val"].dtype == other.meta["val"].dtype


def _activated(formula: Formula) -> Formula:
    """With the logits of the gates, where the operator takes the logsigmoid."""
    decay = formula.decay
    if decay is None or formula.normalizer is not None:
        return formula
    if decay.domain == "logit":
        return replace(formula, decay=replace(decay, domain=""), normalizer=1.0)
    if decay.domain == "factor":
        return _at(formula, decay, 1.0) if opname(decay.node) == "sigmoid" else formula
    node, factor = _unscaled(decay.node)
    fits = opname(node) in ("log_sigmoid", "logsigmoid", "log_sigmoid_forward") and factor > 0
    return _at(formula, replace(decay, node=node), 1 / factor) if fits else formula


def _at(formula: Formula, decay: Operand, normalizer: float) -> Formula:
    logits = decay.node.args[0]
    assert isinstance(logits, fx.Node)
    return replace(formula, decay=replace(decay, node=logits, domain=""), normalizer=normalizer)


def _unpadded(part: Part, formula: Formula) -> tuple[Part, Formula]:
    cut = _cut(part)
    if cut is None:
        return part, formula
    wide = [x for x in formula.operands if x.node in part.operands]
    given = {x.node: _unfilled(x.node, part.operands[x.node], cut, part.axis) for x in wide}
    if any(node is None for node in given.values()):
        return part, formula
    roles = {
        role: replace(x, node=node)
        for role in ("q", "k", "v", "decay", "beta", "factor")
        if (x := getattr(formula, role)) is not None and (node := given.get(x.node)) is not None
    }
    return replace(part, out=cut), replace(formula, **roles)


def _cut(part: Part) -> fx.Node | None:
    """The first tokens of the result, if nobody reads more of it."""
    node = part.out
    while len(node.users) == 1:
        (user,) = node.users
        if opname(user) == "slice" and _is_from_the_first(user):
            if named(user, "dim", 0) % len(shape(user)) == part.axis:
                return user
            if not _is_whole(user):
                return None
        elif opname(user) not in _WHOLE:
            return None
        node = user
    return None


def _is_from_the_first(node: fx.Node) -> bool:
    return named(node, "step", 1) == 1 and named(node, "start") in (0, None)


def _is_whole(node: fx.Node) -> bool:
    """Whether a slice leaves nothing out."""
    end = named(node, "end")
    return end is None or (isinstance(end, int) and end >= _ALL)


def _unfilled(node: fx.Node, axis: int, cut: fx.Node, at: int) -> fx.Node | None:
    """What was padded at the end of its tokens, if it has as many as are cut out in the end."""
    for source in _unpadding(node, axis):
        if same(shape(source)[axis], shape(cut)[at]):
            return source
    return None


def _unpadding(node: fx.Node, axis: int) -> Iterator[fx.Node]:
    while opname(node) in ("pad", "constant_pad_nd"):
        source, widths = node.args[0], named(node, "pad")
        last = 2 * (len(shape(node)) - 1 - axis)
        if not isinstance(source, fx.Node) or any(w != 0 for i, w in enumerate(widths) if i != last + 1):
            return
        yield source
        node = source
