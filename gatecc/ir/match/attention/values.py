"""From a softmax forwards to the product of weights and values."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from torch import fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.match.axes import axis_after
from gatecc.ir.match.product import Product, product
from gatecc.ir.ops import CASTS, CONTRACTIONS, DROPOUTS, VIEWS, argument, opname
from gatecc.ir.scalars import scalar
from gatecc.ir.sizes import node_shape

# Heads and keys in another order: each meets the values of another one.
_REORDERING = frozenset("roll flip gather index index_select unfold repeat tile".split())
_PASSING = (VIEWS - _REORDERING) | CASTS | DROPOUTS | frozenset(("nan_to_num",))
_CHANGING = _REORDERING | frozenset(
    "add sub mul div sigmoid relu batch_norm layer_norm exp log pow cumsum sum mean amax maximum minimum "
    "masked_fill where tril triu clamp clamp_min threshold topk scatter sort cat".split()
)
_BUDGET = 64


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """``source`` sums values over the letter ``keys``; ``operand`` is the weights as they enter it, ``path`` the nodes
    from the softmax (excluded) to the operand.
    """

    source: Product
    keys: str
    operand: fx.Node
    path: tuple[fx.Node, ...]

    @property
    def values(self) -> fx.Node:
        return self.source.right if self.operand is self.source.left else self.source.left

    @property
    def weights_axes(self) -> str:
        return self.source.left_axes if self.operand is self.source.left else self.source.right_axes

    @property
    def values_axes(self) -> str:
        return self.source.right_axes if self.operand is self.source.left else self.source.left_axes


@dataclass(frozen=True, eq=False)
class Blocked:
    """Why no product with values was reached: the code of the cause and the node that stood in the way."""

    code: str
    node: fx.Node


def find_values(weights: fx.Node, axis: int, flow: Flow) -> WeightedSum | Blocked | None:
    """The product in which ``weights`` (normalised over ``axis``) weigh values; None if they are only read
    otherwise."""
    rank = len(node_shape(weights) or ())
    queue: deque[tuple[fx.Node, int | None, tuple[fx.Node, ...]]] = deque([(weights, axis % rank, ())])
    seen: set[fx.Node] = {weights}
    blocked: Blocked | None = None
    while queue and len(seen) < _BUDGET:
        node, at, path = queue.popleft()
        for user in sorted(node.users, key=flow.order.__getitem__):
            if user in seen:
                continue
            seen.add(user)
            outcome = _meet(user, node, at, path, flow)
            if isinstance(outcome, WeightedSum):
                return outcome
            if isinstance(outcome, Blocked):
                blocked = blocked or outcome
            elif passes(user, node, flow):
                queue.append((user, axis_after(user, node, at) if at is not None else None, (*path, user)))
            elif opname(user) in _CHANGING and opname(user) != "":
                blocked = blocked or _change(user, node, flow)
    return blocked


def _meet(
    user: fx.Node, node: fx.Node, at: int | None, path: tuple[fx.Node, ...], flow: Flow
) -> WeightedSum | Blocked | None:
    """What happens where the weights enter a contraction; None if ``user`` is no contraction."""
    if opname(user) not in CONTRACTIONS:
        return None
    found = product(user)
    side = found.side(node) if found is not None else None
    if found is None or side is None:
        changed = opname(user).startswith("conv") or any(n in flow.raw for n in user.all_input_nodes)
        return Blocked("GCC101" if changed else "GCC106", user)
    axes, other, _ = side
    if other in flow.raw and at is not None and axes[at] not in found.contracted:
        return Blocked("GCC101", user)
    if at is None:
        return Blocked("GCC106", user)
    if axes[at] in found.contracted:
        return WeightedSum(found, axes[at], node, path)
    return Blocked("GCC104", user)


def passes(user: fx.Node, node: fx.Node, flow: Flow) -> bool:
    """Whether ``user`` leaves the weights as they are but for zeros, casts and moves."""
    name = opname(user)
    if name in _PASSING:
        return bool(user.args) and (user.args[0] is node or name == "getitem")
    if name == "masked_fill":
        return user.args[0] is node and scalar(argument(user, 2, "value"), flow) == 0.0
    if name == "where":
        return any(scalar(x, flow) == 0.0 for x in user.args[1:3] if x is not node)
    if name in ("mul", "div"):
        other = user.args[1] if user.args[0] is node else user.args[0]
        return scalar(other, flow) == 1.0 or (name == "mul" and is_binary(other))
    return False


def is_binary(value: object) -> bool:
    """Whether a tensor was made from booleans: it holds zeros and ones alone."""
    while isinstance(value, fx.Node) and opname(value) in VIEWS | CASTS and isinstance(value.args[0], fx.Node):
        if _is_bool(value):
            return True
        value = value.args[0]
    return isinstance(value, fx.Node) and _is_bool(value)


def _is_bool(node: fx.Node) -> bool:
    held = node.meta.get("val")
    return str(getattr(held, "dtype", "")) == "torch.bool"


def _change(user: fx.Node, node: fx.Node, flow: Flow) -> Blocked | None:
    """GCC101 if the changed weights go on to a contraction within a few steps, else nothing that concerns attention."""
    frontier, steps = [user], 0
    while frontier and steps < 12:
        current = frontier.pop()
        steps += 1
        for reader in current.users:
            if opname(reader) in CONTRACTIONS:
                return Blocked("GCC101", user)
            if opname(reader) in _CHANGING | _PASSING:
                frontier.append(reader)
    return None


def dropout_of(path: tuple[fx.Node, ...]) -> float:
    """The probability with which weights are dropped on the way."""
    for node in path:
        if opname(node) in DROPOUTS and argument(node, 2, "train"):
            return float(argument(node, 1, "p"))
    return 0.0
