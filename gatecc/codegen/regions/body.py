"""Body: the lines of a kernel that compute a region's values over one space of rows and columns."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from gatecc.codegen.regions.expressions import FUNCTIONS, UnprintableError, expression, literal
from gatecc.codegen.regions.region import (
    ALIASES,
    CASTS,
    CONSTANTS,
    REDUCTIONS,
    Kind,
    RefusedError,
    Region,
    dtype,
    name_of,
    rows_of,
    shape,
)

_TYPES = {torch.bfloat16: "tl.bfloat16", torch.float16: "tl.float16", torch.float32: "tl.float32"}
_RESERVED = {
    *"tl triton torch rows cols mask row_mask col_mask at inner parts kernel a b k start first group turn".split(),
    *"across down row_block col_block inner_mask middle middle_mask begin end each count".split(),
    *FUNCTIONS.values(),
}


@dataclass(frozen=True)
class Value:
    """A value in a kernel: the text that yields it, (rows, columns) of which one may be 1, and over what it runs."""

    text: str
    kind: Kind
    literal: bool = False


@dataclass(frozen=True)
class Space:
    """Names of the indices and masks of a block of rows and columns, and how many columns there are in all."""

    rows: str
    cols: str
    row_mask: str
    col_mask: str
    width: int
    first: str = "tl.program_id(1) == 0"  # of the programs that share rows


class Body:
    """Prints values on demand, each once; ``known`` are there already (products).

    ``in_blocks``: columns go by in a loop. What all of them share is printed before it, in ``outside``; a row that is
    reduced must be known.
    """

    def __init__(
        self, region: Region, space: Space, known: dict[fx.Node, Any] | None = None, *, in_blocks: bool = False
    ) -> None:
        self.region, self.space, self.in_blocks = region, space, in_blocks
        self.lines: list[str] = []
        self.outside: list[str] = []
        self.values: dict[fx.Node, Any] = dict(known or {})

    def value(self, node: fx.Node) -> Value:
        """A node's value, printed with all that it needs. Raises RefusedError."""
        if node not in self.values:
            self.values[node] = self.load(node) if node.op == "placeholder" else self._call(node)
        return self.values[node]

    def tiles(self) -> set[str]:
        """The names of values that run over rows and columns."""
        return {x.text for v in self.values.values() for x in _parts(v) if x.kind == "tile"}

    def shared(self) -> dict[fx.Node, Any]:
        """The values that are the same in all columns, for another space of the same rows."""
        return {n: v for n, v in self.values.items() if all(x.kind in ("column", "scalar") for x in _parts(v))}

    def say(self, found: Value, text: str) -> Value:
        """The line that computes a value."""
        where = self.outside if self.in_blocks and found.kind in ("column", "scalar") else self.lines
        where.append(f"{found.text} = {text}")
        return found

    def _call(self, node: fx.Node) -> Any:
        name = name_of(node)
        if name in CONSTANTS:
            return Value(literal(_filled(node, name)), "scalar", literal=True)
        if name == "getitem":
            source, index = node.args[0], cast("int", node.args[1])
            found: Any = self.value(source)  # pyright: ignore[reportArgumentType]
            return found[index] if isinstance(found, tuple) else found
        if name in ALIASES:
            given = self.value(node.args[0])  # pyright: ignore[reportArgumentType]
            return self._expanded(node, given) if name == "expand" else self._checked(node, given)
        if name in REDUCTIONS:
            return self._reduced(node, name)
        if name in CASTS:
            return self._cast(node)
        operands = [self.value(a) if isinstance(a, fx.Node) else Value(_written(a), "scalar", True) for a in node.args]
        try:
            text = expression(node, name, [x.text for x in operands])
        except UnprintableError as error:
            raise RefusedError(str(error)) from error
        found = Value(self.name(node), _joined([x.kind for x in operands]))
        return self._checked(node, self.say(found, text))

    def _expanded(self, node: fx.Node, given: Value) -> Value:
        """A value over more than it was; what reads it broadcasts."""
        sizes = shape(node)
        rows = rows_of(sizes[:-1], self.region.rows) in ("all", "some")
        kind = _joined([given.kind, "column" if rows else "scalar", "row" if sizes[-1] > 1 else "scalar"])
        return self._checked(node, Value(given.text, kind, given.literal))

    def _cast(self, node: fx.Node) -> Value:
        given, to = self.value(node.args[0]), dtype(node)  # pyright: ignore[reportArgumentType]
        source = dtype(node.args[0])  # pyright: ignore[reportArgumentType]
        if given.literal or source == to:
            return given
        if to == torch.bool:
            text = f"{given.text} != 0"
        elif source == torch.bool or to == torch.float32:
            text = f"{given.text}.to(tl.float32)" if source == torch.bool else given.text
        else:
            text = f"{given.text}.to({_TYPES[to]}).to(tl.float32)"
        if text == given.text:
            return given
        return self.say(Value(self.name(node), given.kind), text)

    def _reduced(self, node: fx.Node, name: str) -> Any:
        if self.in_blocks:
            raise RefusedError(f"{name} of a row that a program does not hold")
        given = self.value(node.args[0])  # pyright: ignore[reportArgumentType]
        if given.kind not in ("tile", "row") or given.literal:
            raise RefusedError(f"{name} over columns that are all the same")
        kind: Kind = "column" if given.kind == "tile" else "scalar"
        x, keep, width = given.text, self.space.col_mask, self.space.width
        there = f"{keep}[None, :]"
        own = self.name(node)
        if name in ("amax", "amin"):
            away = "float('-inf')" if name == "amax" else "float('inf')"
            self.lines.append(f"{own} = tl.{name[1:]}(tl.where({there}, {x}, {away}), 1)[:, None]")
            return self._checked(node, Value(own, kind))
        mean = own if name in ("sum", "mean") else f"{own}_mean"
        over = "" if name == "sum" else f" / {width}.0"
        self.lines.append(f"{mean} = tl.sum(tl.where({there}, {x}, 0.0), 1)[:, None]{over}")
        if name in ("sum", "mean"):
            return self._checked(node, Value(own, kind))
        correction = node.kwargs.get("correction", 1)
        spread = f"tl.where({there}, ({x} - {mean}) * ({x} - {mean}), 0.0)"
        divisor = float(max(0.0, width - (1 if correction is None else correction)))  # pyright: ignore[reportOperatorIssue, reportArgumentType]
        self.lines.append(f"{own} = tl.sum({spread}, 1)[:, None] / {divisor}")
        found = Value(own, kind)
        return (found, Value(mean, kind)) if name == "var_mean" else self._checked(node, found)

    def load(self, node: fx.Node) -> Value:
        """Read an input. A kernel whose inputs lie otherwise than in order has its own."""
        place, kind = self._place(node)
        mask = {"tile": "mask", "column": f"{self.space.row_mask}[:, None]", "row": f"{self.space.col_mask}[None, :]"}
        over = "" if kind == "scalar" else f", mask={_mask(self.space) if kind == 'tile' else mask[kind]}, other=0.0"
        text = f"tl.load({node.name} + {place}{over})" if place else f"tl.load({node.name})"
        text += " != 0" if dtype(node) == torch.bool else ".to(tl.float32)"
        return self.say(Value(self.name(node), kind), text)

    def _place(self, node: fx.Node) -> tuple[str, Kind]:
        """Where an input's elements lie, and over what it runs."""
        sizes, rows, width = shape(node), self.region.rows, self.space.width
        if not sizes or math.prod(sizes) == 1:
            return "", "scalar"
        last, over = sizes[-1], rows_of(sizes[:-1], rows)
        if last not in (1, width) or over == "other":
            if rows_of(sizes, rows) == "all":  # rows whose last axis was reduced away
                return f"{self.space.rows}[:, None]", "column"
            raise RefusedError(f"an input of shape {list(sizes)} beside rows of {width}")
        columns = f"{self.space.cols}[None, :]" if last == width else ""
        if over == "none":
            return columns, "row"
        index = self.space.rows if over == "all" else f"({_mapped(self.space.rows, sizes[:-1], rows)})"
        row = f"{index}[:, None]" + (f" * {last}" if last > 1 else "")
        return (f"{row} + {columns}", "tile") if columns else (row, "column")

    def _checked(self, node: fx.Node, found: Any) -> Any:
        """The value, if its axes are those of the node's shape."""
        if isinstance(found, tuple) or found.literal or not isinstance(node.meta["val"], torch.Tensor):
            return found
        sizes, rows = shape(node), self.region.rows
        last, over = (sizes[-1], rows_of(sizes[:-1], rows)) if sizes else (1, "none")
        fits = {
            "tile": last == self.space.width and over in ("all", "some"),
            "column": rows_of(sizes, rows) in ("all", "some") or (last == 1 and over in ("all", "some")),
            "row": last == self.space.width and over == "none",
            "scalar": math.prod(sizes) == 1,
        }
        if not fits[found.kind]:
            raise RefusedError(f"{name_of(node)} changes axes: {list(sizes)} in a space of {list(rows)} rows")
        return found

    def name(self, node: fx.Node) -> str:
        name = node.name
        return f"{name}_" if name in _RESERVED or node.op == "placeholder" else name


def _parts(found: Any) -> tuple[Value, ...]:
    return found if isinstance(found, tuple) else (found,)


def _mask(space: Space) -> str:
    return "mask" if space.cols == "cols" else f"{space.row_mask}[:, None] & {space.col_mask}[None, :]"


def _joined(kinds: list[Kind]) -> Kind:
    rows = any(kind in ("tile", "column") for kind in kinds)
    cols = any(kind in ("tile", "row") for kind in kinds)
    return "tile" if rows and cols else "column" if rows else "row" if cols else "scalar"


def _written(value: Any) -> str:
    try:
        return literal(value)
    except UnprintableError:
        return ""  # an option (approximate), which the expression reads from the node


def _filled(node: fx.Node, name: str) -> Any:
    if name in ("zeros_like", "zeros"):
        return 0.0
    if name in ("ones_like", "ones"):
        return 1.0
    return node.args[0] if name == "scalar_tensor" else node.args[1]


def _mapped(rows: str, lead: tuple[int, ...], space: tuple[int, ...]) -> str:
    """The row of an input that lacks some of the leading axes, from the row of the space. Their sizes are those of the
    call: lead1, lead2 ..., of the space."""
    padded = (1,) * (len(space) - len(lead)) + lead
    parts: list[str] = []
    for axis, own in enumerate(padded):
        if own == 1:
            continue
        behind = range(axis + 1, len(space))
        inner = " * ".join(f"lead{i}" for i in behind)
        stride = "".join(f" * lead{i}" for i in behind if padded[i] > 1)
        index = f"{rows} // ({inner})" if inner else rows
        parts.append((f"({index}) % lead{axis}" if axis else f"({index})") + stride)
    return " + ".join(parts) or f"{rows} * 0"


def counts(region: Region, lines: Iterable[str]) -> str:
    """The names of sizes that a kernel with these lines is given: how many rows, and which leading axes they are of."""
    if not any("lead1" in line or "lead2" in line for line in lines):
        return "count"
    return ", ".join(["count", *(f"lead{i}" for i in range(1, len(region.rows)))])
