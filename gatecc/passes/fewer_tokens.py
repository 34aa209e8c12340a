"""fewer: a part of the graph again, on fewer tokens than it was captured with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, cast

import torch
from torch import Tensor, fx

from gatecc.errors import GateccError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.ops import opname
from gatecc.ir.program import fake, shape
from gatecc.ir.sizes import expression, on_example
from gatecc.passes.again import between
from gatecc.passes.operands import place

_VIEWS = frozenset("view reshape _unsafe_view".split())
_ALONG = frozenset("slice select narrow split split_with_sizes chunk index_select cumsum flip roll unbind".split())
_WINDOWS = frozenset("conv1d conv2d conv3d convolution max_pool1d max_pool2d avg_pool1d avg_pool2d".split())
_END = 1 << 40


def fewer(edit: Editor, given: fx.Node, tokens: fx.Node, target: fx.Node, axis: int) -> fx.Node:
    """``target`` as computed from ``tokens`` in the place of ``given``, of which it has fewer along ``axis``.

    Sizes that the graph holds as numbers are those of the new number, as far as they follow from it. Raises
    SiteRefusedError where the places of tokens matter on the way, or something else knows their number.
    """
    nodes = between(edit.program.graph, {given: given}, (target,))
    inside = {given, *nodes}
    outer = list(dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n not in inside))
    tensors = [n for n in outer if isinstance(fake(n), Tensor)]
    rest = [n for n in outer if n not in tensors]
    old, new = int(shape(given)[axis]), int(shape(tokens)[axis])
    run = _Run(given, axis, old, new, tuple(nodes), tuple(tensors), tuple(rest), target)
    try:
        found = edit.call(run, tokens, *tensors, name="fewer")
    except GateccError:
        raise
    except Exception as error:
        raise _refused(edit, f"{run.at}: {str(error).splitlines()[0]}") from error
    wanted = [new if i == axis else size for i, size in enumerate(shape(target))]
    if [on_example(s) for s in shape(found)] != [on_example(s) for s in wanted]:
        raise _refused(edit, f"({shape(found)}) where ({wanted}) was expected")
    return found


def _refused(edit: Editor, found: str) -> SiteRefusedError:
    return SiteRefusedError(
        "the blocks cannot run on fewer tokens",
        where=place(edit.site),
        found=found,
        expected="blocks that mix tokens wherever these are: attention without a bias or a rotary table for each place",
        do="select other blocks",
    )


class _PlacesError(Exception):
    """An operator along the tokens needs all of them."""


@dataclass
class _Run:
    """Runs nodes, with other numbers where the graph holds sizes."""

    given: fx.Node
    axis: int
    old: int
    new: int
    nodes: Sequence[fx.Node]
    tensors: Sequence[fx.Node]
    rest: Sequence[fx.Node]
    target: fx.Node
    at: str = ""

    def __call__(self, tokens: Tensor, *others: Tensor) -> Tensor:
        values: dict[fx.Node, Any] = {self.given: tokens, **dict(zip(self.tensors, others, strict=True))}
        batch = expression(shape(self.given)[0])
        for node in self.rest:
            size = expression(node.meta["val"]) if isinstance(node.meta.get("val"), int | torch.SymInt) else None
            self.at = node.name
            if size is None or size not in (batch, batch * self.old):
                raise _PlacesError("a value that is no tensor and no number of samples")
            values[node] = tokens.size(0) if size == batch else tokens.size(0) * self.new
        axes = {self.given: {self.axis}}  # those that count the tokens
        for node in self.nodes:
            self.at = f"{node.name} ({opname(node)})"
            self._check(node, axes)
            args, kwargs = cast("tuple[Any, Any]", fx.map_arg((node.args, node.kwargs), values.__getitem__))
            if opname(node) in _VIEWS:
                args = (args[0], self._viewed(node, args[1], axes), *args[2:])
            elif opname(node) == "expand":
                args = (args[0], self._expanded(node, args[1], axes), *args[2:])
            result = cast("Any", node.target)(*args, **kwargs)
            values[node] = result
            if isinstance(result, Tensor):
                axes[node] = self._counted(node, result)
        return values[self.target]

    def _counted(self, node: fx.Node, result: Tensor) -> set[int]:
        """The axes of a result that are shorter now."""
        before, after = _hints(node), [on_example(s) for s in result.shape]
        if len(before) != len(after) or any(
            a not in (b, b // self.old * self.new) for b, a in zip(before, after, strict=True)
        ):
            raise _PlacesError(f"{after} where {before} was captured")
        return {i for i, (b, a) in enumerate(zip(before, after, strict=True)) if a != b}

    def _check(self, node: fx.Node, axes: Mapping[fx.Node, set[int]]) -> None:
        name, args = opname(node), cast("tuple[Any, ...]", node.args)
        source = args[0] if args else None
        if name not in _ALONG | _WINDOWS or not isinstance(source, fx.Node):
            return
        if _reached(name, args, len(shape(source))) & axes.get(source, set()):
            raise _PlacesError("it works along the tokens")

    def _viewed(self, node: fx.Node, sizes: Sequence[Any], axes: Mapping[fx.Node, set[int]]) -> list[Any]:
        """The sizes of a view: those of the axes that the tokens' axes become or are merged into."""
        source = cast("fx.Node", node.args[0])
        before, after = _hints(source), _hints(node)
        made = list(sizes)
        for axis in axes.get(source, ()):
            start, stop = prod(before[:axis]), prod(before[: axis + 1])
            around = [i for i in range(len(after)) if prod(after[:i]) <= start and prod(after[: i + 1]) >= stop]
            around = [i for i in around if after[i] % self.old == 0]
            if not around:
                raise _PlacesError("it lays the tokens out, as a grid or otherwise")
            if made[around[-1]] != -1:
                made[around[-1]] = made[around[-1]] // self.old * self.new
        return made

    def _expanded(self, node: fx.Node, sizes: Sequence[Any], axes: Mapping[fx.Node, set[int]]) -> list[Any]:
        source = cast("fx.Node", node.args[0])
        made, more = list(sizes), len(sizes) - len(shape(source))
        for axis in axes.get(source, ()):
            made[axis + more] = -1
        return made


def _reached(name: str, args: tuple[Any, ...], rank: int) -> set[int]:
    """The axes along which an operator works."""
    if name in _WINDOWS:
        return set(range(1, rank))  # a window over one axis may have channels first or none
    if (
        name == "slice"
        and len(args) > 2
        and args[2] in (0, None)
        and (len(args) < 4 or args[3] is None or args[3] > _END)
    ):
        return set()  # all of it
    where = {"split": 2, "split_with_sizes": 2, "chunk": 2, "flip": 1, "roll": 2}.get(name, 1)
    dims = args[where] if len(args) > where else 0
    return {int(d) % rank for d in (dims if isinstance(dims, list | tuple) else [dims])}


def _hints(node: fx.Node) -> list[int]:
    return [int(on_example(s) or 0) for s in shape(node)]
