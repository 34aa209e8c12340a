"""Trial: a part of a captured graph, run on numbers of one's own in float64, to see what formula it computes.

However a model spells a layer, its numbers say what it is: what a pattern would have to know of views, casts and
dispatch is run instead. All floating-point numbers are float64, on the CPU; dropout is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import sympy
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.node import map_aggregate

from gatecc.ir.ops import CASTS, DROPOUTS, opname
from gatecc.ir.program import Program
from gatecc.ir.sizes import Sizes, UnknownSizeError, example_sizes, expression, on_example, value


class UntriedError(Exception):
    """A part of a graph that cannot be run apart; the text says what it reads or calls."""


class UncomputedError(UntriedError):
    """An operator that refuses the numbers, such as sizes that are others than on the example."""


class Trial:
    """``known``: nodes with the numbers that they hold; ``weight``: numbers for a parameter, by its name and its fake
    tensor, None for one that the part may not read. Sizes are those of the example, but for those of ``sizes``, which
    are replaced by others wherever they stand in the graph, and for what ``symbols`` says of free ones; ``shapes``: of
    a node, the place of the argument that holds the sizes of its result, and what they are instead."""

    def __init__(
        self,
        program: Program,
        known: Mapping[fx.Node, Tensor],
        weight: Callable[[str, Tensor], Tensor | None],
        sizes: Mapping[int, int] | None = None,
        symbols: Sizes | None = None,
        shapes: Callable[[fx.Node], tuple[int, list[int]] | None] = lambda node: None,
    ) -> None:
        self._program, self._weight, self._sizes = program, weight, sizes or {}
        self._symbols, self._shapes = symbols or {}, shapes
        self._known: dict[fx.Node, Any] = dict(known)

    def run(self, out: fx.Node) -> Tensor:
        """What a node holds. Raises UntriedError."""
        for node in self.needed(out):
            self._known[node] = self._value(node)
        return cast("Tensor", self._known[out])

    def step(self, node: fx.Node) -> None:
        """Compute one node, whose inputs are known: for those who choose the nodes. Raises UntriedError."""
        if node not in self._known:
            self._known[node] = self._value(node)

    def forget(self, node: fx.Node) -> None:
        """Free the memory of a node that nobody reads any more."""
        self._known.pop(node, None)

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._known

    def __setitem__(self, node: fx.Node, value: Tensor) -> None:
        self._known[node] = value

    def __getitem__(self, node: fx.Node) -> Any:
        """What a node holds that is known."""
        return self._known[node]

    def needed(self, out: fx.Node) -> list[fx.Node]:
        """The nodes that the output needs, in order, up to those that are known; of writers before it, too."""
        seen: set[fx.Node] = set()
        todo = [out]
        while todo:
            node = todo.pop()
            if node in seen or node in self._known:
                continue
            seen.add(node)
            if not isinstance(node.meta.get("val"), int | torch.SymInt):
                todo.extend(node.all_input_nodes)
        return sorted(seen)

    def _value(self, node: fx.Node) -> Any:
        held = node.meta.get("val")
        if isinstance(held, int | torch.SymInt):
            return self._number(held)
        name = self._program.weight_name(node)
        if name is not None and isinstance(held, Tensor) and (found := self._weight(name, held)) is not None:
            return found
        if node.op == "get_attr" and (constant := self._program.constant(node)) is not None:
            if isinstance(constant, FakeTensor):
                raise UntriedError(f"it reads {node.name}, of which only the sizes are known")
            return _wide(constant.detach().cpu().clone())
        if node.op != "call_function":
            raise UntriedError(f"it reads {name or node.name}")
        args, kwargs = map_aggregate((node.args, node.kwargs), self._argument)
        if (given := self._shapes(node)) is not None:
            args = (*args[: given[0]], given[1], *args[given[0] + 1 :])
        if opname(node) in DROPOUTS or _leaves_as_it_is(node, args):
            return args[0]
        try:
            return _wide(_called(node, args, kwargs))
        except (RuntimeError, TypeError, NotImplementedError) as e:
            raise UncomputedError(f"{opname(node)} cannot be tried: {e}"[:200]) from e

    def _argument(self, item: Any) -> Any:
        if isinstance(item, torch.dtype):
            return torch.float64 if item.is_floating_point else item
        return self._known[item] if isinstance(item, fx.Node) else self._size(item)

    def _number(self, held: int | torch.SymInt) -> int:
        if not isinstance(held, torch.SymInt):
            return self._size(held)
        size = expression(held)
        if size.is_Integer:
            return self._size(int(size))
        try:
            if not any(number in self._sizes for number in size.atoms(sympy.Integer)):
                return int(value(held, self._symbols)) if self._symbols else on_example(held) or 1
            widths = {sympy.Integer(one): sympy.Integer(other) for one, other in self._sizes.items()}
            given = self._symbols or example_sizes(self._program)  # s * 512, of a view
            return int(size.xreplace({**widths, **{s: sympy.Integer(n) for s, n in given.items()}}))
        except (UnknownSizeError, TypeError) as e:
            raise UntriedError(f"the size {size} depends on the data") from e

    def _size(self, item: Any) -> Any:
        return self._sizes.get(item, item) if type(item) is int else item


def _leaves_as_it_is(node: fx.Node, args: Any) -> bool:
    """A cast of a floating-point value."""
    held = node.meta.get("val")
    floats = isinstance(held, Tensor) and held.is_floating_point()
    return opname(node) in CASTS and floats and isinstance(args[0], Tensor) and args[0].is_floating_point()


def _wide(value: Any) -> Any:
    """What an operator makes in the default type, in float64."""
    return value.double() if isinstance(value, Tensor) and value.is_floating_point() else value


def _called(node: fx.Node, args: Any, kwargs: dict[str, Any]) -> Any:
    if opname(node) in ("_grouped_mm", "grouped_mm_fallback"):  # the kernels of few dtypes and shapes
        return _grouped(*args[:3])
    if "device" in kwargs:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return cast("Callable[..., Any]", node.target)(*args, **kwargs)


def _grouped(x: Tensor, matrices: Tensor, ends: Tensor) -> Tensor:
    """Rows that are sorted by group, each times the matrix of its group: (S, K) and (G, K, N) -> (S, N)."""
    bounds = [0, *ends.tolist()]
    parts = [x[a:b] @ matrix for a, b, matrix in zip(bounds, bounds[1:], matrices, strict=False)]
    return torch.cat([*parts, x.new_zeros(x.size(0) - bounds[-1], matrices.size(2))])
