"""Skipped: what need not be computed for some samples, found in a graph that computes it for all of them.

A graph is masked: ``where(condition, value, other)``, with one condition per sample, or per token. What only the value
needs could be left undone for the samples whose condition is false, of all their tokens. A rewrite marks such a node
(`mark`); a variant is printed with a body that runs on the samples that need it (gatecc.scope.printed_rows). Whoever
else reads the graph, such as exports and compilers, sees the masked form, which is the same function.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx
from torch._ops import OpOverload

from gatecc.ir.boundary import held
from gatecc.ir.ops import DROPOUTS, SHAPE_ONLY, SOFTMAXES, mutates, named, opname, written
from gatecc.ir.program import META, Program, fake, origin, shape
from gatecc.ir.sizes import described_shape, expression, symbols

_COMBINING = SOFTMAXES | frozenset(
    "log_softmax _log_softmax cumsum cumprod logcumsumexp flip roll sort argsort topk mean sum amax amin max min prod "
    "var std var_mean norm linalg_vector_norm argmax argmin any all logsumexp".split()
)


@dataclass(frozen=True, eq=False)
class Skipped:
    """``node`` is where(condition, value, other). ``inside`` are the nodes that only the value needs, and itself;
    ``sizes`` further ones, which say how many samples there are; ``given`` what these read besides, and ``axes`` which
    axis of that counts samples (None: it is the same for all)."""

    node: fx.Node
    inside: frozenset[fx.Node]
    sizes: frozenset[fx.Node]
    given: tuple[fx.Node, ...]
    axes: tuple[int | None, ...]


def mark(node: fx.Node) -> None:
    """Say of ``where(condition, value, other)``, conditions (b, 1, ...), that the value is needed where they hold."""
    node.meta[META] = replace(origin(node), skips=True)


def skipped(program: Program, kept: Collection[fx.Node] = (), batch: Collection[Any] = ()) -> Iterator[Skipped]:
    """All that can be skipped in a program; what a later edit made impossible to skip is left out, and is masked.

    ``kept``: nodes that are to be computed for all samples. ``batch``: symbols that all stand for their number.
    """
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.where.self):
        if origin(node).skips and isinstance(found := skipped_at(program, node, kept, batch), Skipped):
            yield found


def skipped_at(
    program: Program, node: fx.Node, kept: Collection[fx.Node] = (), batch: Collection[Any] = ()
) -> Skipped | str:
    """What a marked node skips, as `skipped` yields it; a string says why nothing can be skipped."""
    _, value, other = cast("tuple[fx.Node, ...]", node.args)
    if set(value.users) != {node}:
        return "the value is read by others, too"
    if not _alike(value, other):
        return "what stands in for it has another shape or dtype"
    samples = expression(shape(node)[0])
    if samples.is_Integer and samples != 1:
        return f"the graph holds for batches of {samples} alone"
    inside = needed_by(value, held(program.boundaries).union(kept))
    inside -= {n for n in inside if n.target is operator.getitem and n.args[0] not in inside}  # of a list, one is given
    if any(sees_all(n, inside) for n in inside):
        return "it writes to a tensor that outlives it, or compares samples"
    counts = {samples, *(batch if samples in batch else ())}
    known = set[Any]().union(*(symbols(count) for count in counts))
    sizes = set[fx.Node]() if samples == 1 else _sizes(inside, known)
    given = _given(program, inside | sizes)
    axes: list[int | None] = []
    for one in given:
        axis = None if samples == 1 else _axis(one, counts, known)
        if isinstance(axis, str):
            return axis
        axes.append(axis)
    if samples != 1:
        rows = {n for n, axis in zip(given, axes, strict=True) if axis is not None}
        if mixing := _mixing(inside, rows, known):
            return f"{mixing.name} {origin(mixing).line} computes samples from one another"
    return Skipped(node, frozenset(inside), frozenset(sizes), tuple(given), tuple(axes))


def _mixing(inside: set[fx.Node], rows: set[fx.Node], samples: set[Any]) -> fx.Node | None:
    """An operator that computes samples from one another: run for some of them, it would be something else."""

    def axes(node: fx.Node) -> set[int]:
        held = fake(node)
        return set() if held is None else {i for i, size in enumerate(held.shape) if symbols(size) & samples}

    for node in sorted(inside):
        read = [n for n in node.all_input_nodes if n in rows]
        value = node.meta.get("val")
        if not read or isinstance(value, torch.SymInt) or opname(node) in SHAPE_ONLY:
            continue
        rows.add(node)
        if isinstance(value, torch.Tensor) and (not axes(node) or _along(node, read[0]) & axes(read[0])):
            return node
    return None


def _along(node: fx.Node, read: fx.Node) -> set[int]:
    """The axes of what an operator reads along which it combines elements, where it says so."""
    held, name = fake(read), opname(node)
    if held is None:
        return set()
    if name == "scaled_dot_product_attention":
        return {held.dim() - 2}
    if name not in _COMBINING or not isinstance(node.target, OpOverload):
        return set()
    found = named(node, "dim", named(node, "dims", ()))
    dims = [found] if isinstance(found, int) else list(cast("list[int]", found or ()))
    return {dim % max(held.dim(), 1) for dim in dims}


def sees_all(node: fx.Node, inside: Collection[fx.Node] = ()) -> bool:
    """Whether an operator writes to what outlives it, or reads across samples: a batch norm in training does both.

    What is computed ``inside`` does not: an activation in place writes to what its own sample made.
    """
    if opname(node) in ("batch_norm", "instance_norm") and isinstance(node.target, OpOverload):
        return bool(named(node, "training") or (named(node, "use_input_stats") and named(node, "running_mean")))
    into = written(node)
    return mutates(node) and not (into and all(_owner(x) in inside for x in into))


def _owner(node: fx.Node) -> fx.Node | None:
    """The operator that made the memory of a value; None for inputs, weights and results of in-place operators that
    nothing can be said of."""
    while node.op == "call_function" and isinstance(node.target, OpOverload):
        aliases = [a.name for a in node.target._schema.arguments if a.alias_info is not None]
        if opname(node) in DROPOUTS:
            aliases = ["input"]
        if not aliases:
            return node
        source = named(node, aliases[0])
        if not isinstance(source, fx.Node):
            return None
        node = source
    return None


def needed_by(value: fx.Node, kept: Collection[fx.Node] = ()) -> set[fx.Node]:
    """The computations that nothing but ``value`` needs, itself among them; ``kept`` are needed by others besides."""
    inside = {value}
    for node in sorted(_ancestors(value), reverse=True):
        if node.op == "call_function" and node not in kept and inside.issuperset(node.users):
            inside.add(node)
    return inside


def _ancestors(value: fx.Node) -> set[fx.Node]:
    found, todo = set[fx.Node](), [value]
    while todo:
        new = [n for n in todo.pop().all_input_nodes if n not in found]
        found.update(new)
        todo += new
    return found


def _sizes(inside: set[fx.Node], samples: set[Any]) -> set[fx.Node]:
    """The nodes outside that say how many samples there are: inside there are fewer, so it is asked again there."""
    found, todo = set[fx.Node](), list(inside)
    while todo:
        for node in todo.pop().all_input_nodes:
            size = node.meta.get("val")
            number = isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool)
            if not number or node.op != "call_function" or node in inside | found:
                continue
            if symbols(size) & samples:
                found.add(node)
                todo.append(node)
    return found


def _given(program: Program, inside: set[fx.Node]) -> list[fx.Node]:
    read = {n for node in inside for n in node.all_input_nodes}
    for call in program.functions:  # its operators are not printed: the call is, and reads its entries
        if call.inside & inside:
            read |= {entry for entry in call.entries if entry is not None}
    return sorted(read - inside)


def _axis(node: fx.Node, counts: set[Any], known: set[Any]) -> int | str | None:
    value = fake(node)
    if value is None or node.op == "get_attr":
        return None
    with_samples = [i for i, size in enumerate(value.shape) if symbols(size) & known]
    if not with_samples:
        return None
    axis = with_samples[0]
    if len(with_samples) > 1 or expression(value.shape[axis]) not in counts:
        return f"{node.name} ({described_shape(node)}) has no axis of its own for samples"
    return axis


def _alike(one: fx.Node, other: fx.Node) -> bool:
    a, b = fake(one), fake(other)
    if a is None or b is None or a.dtype != b.dtype or a.dim() != b.dim():
        return False
    return all(expression(x) == expression(y) for x, y in zip(a.shape, b.shape, strict=True))
