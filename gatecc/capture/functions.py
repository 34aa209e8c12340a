"""Marks around the calls of custom autograd functions (torch.autograd.Function), while a module is captured.

torch.export records the operators of their forward alone. What goes in and what comes out is marked, so that the
function itself can be called instead (gatecc.ir.functions).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch.autograd import Function
from torch.utils import _pytree as pytree

from gatecc.errors import CaptureError
from gatecc.ir.boundary import MARKER, Slot
from gatecc.ir.functions import FunctionCall, sides

_KNOWN = ("torch.", "gatecc.")  # their gradients are those of their operators, or they are no part of a model


@contextmanager
def functions_marked() -> Generator[list[FunctionCall]]:
    """Each call of a function, in this thread, marks its tensors and is listed. Without gradients none of them is."""
    calls: list[FunctionCall] = []
    if not torch.is_grad_enabled():
        yield calls
        return
    marks = _Marks(calls)
    before: list[tuple[Any, Any]] = []
    try:
        for cls in list(_subclasses(Function)):
            if not cls.__module__.startswith(_KNOWN):
                before.append((cls, vars(cls).get("forward")))
                cls.forward = staticmethod(marks.around(cls, cls.forward))
        yield calls
    finally:
        for cls, forward in before:
            if forward is None:
                del cls.forward
            else:
                cls.forward = forward


def _subclasses(cls: type) -> Iterator[Any]:
    """Every class below, those that are derived before those that they are derived from: they inherit its forward."""
    for below in cls.__subclasses__():
        yield from _subclasses(below)
        yield below


class _Marks:
    def __init__(self, calls: list[FunctionCall]) -> None:
        self.calls = calls
        self.thread = threading.get_ident()
        self.inside = False

    def around(self, cls: Any, forward: Callable[..., Any]) -> Callable[..., Any]:
        """The forward of a class, marked. It has a context before its arguments, unless the class sets that up."""
        context = int(cls.setup_context is Function.setup_context)

        def marked(*args: Any) -> Any:
            if self.inside or threading.get_ident() != self.thread:
                return forward(*args)
            self.inside = True
            try:
                return self._marked(cls, forward, args[:context], args[context:])
            finally:
                self.inside = False

        return marked

    def _marked(self, cls: Any, forward: Callable[..., Any], context: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
        entering, leaving = sides(len(self.calls))
        call = FunctionCall(cls)
        self.calls.append(call)
        call.arguments, given = _slots(args, entering, cls)
        output = forward(*context, *given)
        call.several = isinstance(output, tuple)
        call.results, marked = _slots(output if call.several else (output,), leaving, cls)
        return marked if call.several else marked[0]


def _slots(values: tuple[Any, ...], side: int, cls: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    kept: list[Any] = []
    marked: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            slot = Slot(sum(isinstance(one, Slot) for one in kept))
            kept.append(slot)
            marked.append(MARKER(value, side, slot.number))
        elif isinstance(value, tuple | list | dict) and _holds_tensors(value):
            raise CaptureError(
                "a custom autograd function takes or returns tensors in a container",
                where=cls.__qualname__,
                found=type(cast("object", value)).__name__,
                do="pass the tensors one by one",
            )
        else:
            kept.append(value)
            marked.append(value)
    return tuple(kept), tuple(marked)


def _holds_tensors(value: Any) -> bool:
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(value))
