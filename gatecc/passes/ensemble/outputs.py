"""Outputs: the part of a model's output that is taken, and several outputs weighted and put together row by row."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from gatecc.errors import ArgumentError
from gatecc.passes.samples import over

COMBINES = ("sum", "smooth", "unit")


def part(name: str, output: Any, path: str) -> Any:
    """The part of an output at a path: ``logits``, ``hidden_states.0``; all of it for "". Raises ArgumentError."""
    for step in path.split(".") if path else ():
        keyed = isinstance(output, Mapping)
        try:
            output = output[step] if keyed else output[int(step)] if step.isdigit() else getattr(output, step)
        except (KeyError, IndexError, AttributeError, TypeError):
            keys = ", ".join(map(str, output)) if keyed else type(output).__name__
            raise ArgumentError("the output has no such part", where=name, found=f"{path!r} of {keys}") from None
    return output


def check_alike(outputs: Mapping[str, Any], rows: int) -> None:
    """Raise ArgumentError if outputs cannot be joined: other structures, shapes or dtypes, or no row per sample."""
    do = 'take one part of each: output="logits", or {member: part}; or bring it to one shape: project={member: module}'
    (first, one), *others = outputs.items()
    leaves, spec = pytree.tree_flatten(one)
    for leaf in leaves:
        if isinstance(leaf, Tensor) and (leaf.dim() == 0 or leaf.size(0) != rows):
            raise ArgumentError(
                "a member returns a tensor that does not have a row for each sample",
                where=first,
                found=f"shape {tuple(leaf.shape)} for {rows} samples",
                do=do,
            )
    for name, other in others:
        its, its_spec = pytree.tree_flatten(other)
        if its_spec != spec:
            found = f"{_kind(one)} and {_kind(other)}"
            raise ArgumentError("outputs of members differ in structure", where=f"{first}, {name}", found=found, do=do)
        for x, y in zip(leaves, its, strict=True):
            if _form(x) != _form(y):
                found = f"{_form(x)} and {_form(y)}"
                raise ArgumentError("outputs of members differ", where=f"{first}, {name}", found=found, do=do)


def _kind(output: Any) -> str:
    keys = f" of {', '.join(map(str, output))}" if isinstance(output, Mapping) else ""
    return type(output).__name__ + keys


def _form(leaf: Any) -> str:
    return f"{str(leaf.dtype).removeprefix('torch.')} {tuple(leaf.shape)}" if isinstance(leaf, Tensor) else repr(leaf)


class Sum:
    """Weighted outputs added up in float32 (or wider), in the order in which they come: the order of the members.

    A row that nothing was added to is 0. Whole numbers are taken as they are, from the one member that is chosen.
    """

    def __init__(self, rows: int, combine: str = "sum", uniform: Tensor | None = None, one: bool = False) -> None:
        self.rows = rows
        self.combine = combine
        self.one = one  # each sample has one member
        self.uniform = uniform  # (E, C): what "smooth" mixes in
        self.spec: Any = None
        self.dtypes: list[torch.dtype | None] = []
        self.totals: list[Any] = []

    def add(
        self,
        member: int,
        output: Any,
        weights: Tensor | float,
        at: Tensor | None,
        mask: Tensor | None,
        only: Callable[[Any], Any] = lambda parts: parts,
    ) -> None:
        """Add one member's output. ``weights``: (rows of the output,); ``at``: which rows these are, None for all.

        ``mask``: (rows,), of a member that ran on all rows, the ones that chose it: nothing of the others comes
        through, not even a NaN. ``only`` marks what is added as 0 for all samples unless one chose the member.
        """
        leaves, self.spec = pytree.tree_flatten(output)
        parts = only([self._weighted(member, x, weights, mask) if isinstance(x, Tensor) else x for x in leaves])
        if not self.totals:
            self.dtypes = [x.dtype if isinstance(x, Tensor) else None for x in leaves]
            self.totals = [self._start(x, at) for x in parts]
            return
        for i, x in enumerate(parts):
            if isinstance(x, Tensor):
                self.totals[i] = self.totals[i] + x if at is None else self.totals[i].index_add(0, at, x)

    def result(self) -> Any:
        """The output of the ensemble, in the structure and the dtypes of its members'."""
        pairs = zip(self.totals, self.dtypes, strict=True)
        return pytree.tree_unflatten([x if dtype is None else self._end(x, dtype) for x, dtype in pairs], self.spec)

    def _start(self, x: Any, at: Tensor | None) -> Any:
        if at is None or not isinstance(x, Tensor):
            return x
        return x.new_zeros(self.rows, *x.shape[1:]).index_add(0, at, x)

    def _weighted(self, member: int, x: Tensor, weights: Tensor | float, mask: Tensor | None) -> Tensor:
        if mask is not None:
            x = torch.where(over(mask, x), x, torch.zeros_like(x))
        if not (x.is_floating_point() or x.is_complex()):
            return self._whole(member, x)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        if not isinstance(weights, Tensor):
            return x * weights
        w = over(weights.to(x.dtype), x)
        if self.combine == "smooth" and self.uniform is not None:
            return w * (w * x + (1 - w) * self.uniform[member].to(x.dtype))
        return w * x

    def _whole(self, member: int, x: Tensor) -> Tensor:
        if not self.one:
            raise ArgumentError(
                "outputs that are whole numbers cannot be weighted",
                where=f"member {member}",
                found=_form(x),
                do="choose one member for each sample (k=1), or take another part of the output: output=...",
            )
        return x.long() if x.dtype is torch.bool else x

    def _end(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        if self.combine == "unit" and x.is_floating_point():
            x = torch.nn.functional.normalize(x, dim=-1)
        return x.to(dtype)


def rows_of(values: Sequence[Any]) -> int:
    """The number of samples of a call: the size of the first axis of the first tensor. Raises ArgumentError."""
    first = next((x for x in pytree.tree_leaves(values) if isinstance(x, Tensor) and x.dim()), None)
    if first is None:
        raise ArgumentError("no input of the ensemble is a tensor with a row for each sample")
    return first.size(0)


def take(name: str, value: Any, at: Tensor, rows: int) -> Any:
    """The rows ``at`` of every tensor in a value; numbers, constants and tensors with one row go to every sample."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.dim() or (x.size(0) == 1 and rows != 1):
            return x
        if x.size(0) != rows:
            raise ArgumentError(
                "an input of the ensemble does not have a row for each sample",
                where=name,
                found=f"{x.size(0)} rows for {rows} samples",
                expected=f"{rows}, or 1 for all of them",
            )
        return x.index_select(0, at)

    return pytree.tree_map(one, value)
