"""Marks on the calls of submodules that hooks look at, while a module is captured.

A hook of a user must not see the tensors of a capture, nor be called when the module itself is not. What it is to see
on a real call is marked instead (gatecc.ir.boundary).
"""

from __future__ import annotations

from collections.abc import Collection, Generator
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.signature import CONSTANTS
from gatecc.errors import CaptureError
from gatecc.ir.boundary import MARKER, Boundary, Slot
from gatecc.ir.hooks import silenced


@contextmanager
def marked(root: nn.Module, paths: Collection[str]) -> Generator[list[Boundary]]:
    """As `silenced`; each call of the submodules ``paths`` marks its arguments and its output, and is listed."""
    sides: list[Boundary] = []
    with silenced(root), ExitStack() as stack:
        for path in paths:
            marks = _Marks(path, sides)
            module = root.get_submodule(path)
            stack.callback(module.register_forward_pre_hook(marks.enter, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(marks.leave).remove)
        yield sides


class _Marks:
    def __init__(self, path: str, sides: list[Boundary]) -> None:
        self.path = path
        self.sides = sides
        self.open: list[Boundary] = []  # a module may call itself

    def enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        boundary, marked = self._mark((args, kwargs), leaving=False)
        self.open.append(boundary)
        return marked

    def leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        boundary, marked = self._mark(output, leaving=True)
        boundary.entry = self.open.pop()
        return marked

    def _mark(self, tree: Any, *, leaving: bool) -> tuple[Boundary, Any]:
        flat, spec = pytree.tree_flatten(tree)
        slots: dict[int, Slot] = {}
        marked: dict[Slot, torch.Tensor] = {}
        leaves: list[Any] = []
        for leaf in flat:
            if not isinstance(leaf, torch.Tensor):
                leaves.append(self._constant(leaf))
                continue
            slot = slots.setdefault(id(leaf), Slot(len(slots)))
            leaves.append(slot)
            if slot not in marked:
                marked[slot] = cast("torch.Tensor", MARKER(leaf, len(self.sides), slot.number))
        boundary = Boundary(self.path, leaving, spec, tuple(leaves))
        self.sides.append(boundary)
        return boundary, pytree.tree_unflatten([marked[x] if isinstance(x, Slot) else x for x in leaves], spec)

    def _constant(self, leaf: Any) -> Any:
        if leaf is None or isinstance(leaf, CONSTANTS):
            return leaf
        raise CaptureError(
            "a hook is to see a value that no graph can hold",
            where=self.path,
            found=f"the submodule takes or returns a {type(leaf).__qualname__}",
            do="take the hook off for this call (handle.remove()), or put it on a module that takes tensors",
        )
