"""Kernels in Triton's interpreter: which accesses leave the tensors that a kernel was given, which programs collide,
how many bytes move.

The interpreter itself reads garbage outside of tensors, in silence, and runs programs one after the other, so that
races between them stay unseen. It says nothing of warps, barriers and shared memory inside a program.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from gatecc.codegen.judge.swapped import swapped

Function = Callable[..., Any]


@dataclass
class Traffic:
    """Bytes that a kernel's launches load and store, and how many of them are different ones in their launch."""

    moved: int = 0
    ideal: int = 0

    @property
    def ratio(self) -> float:
        """1 if nothing is read or written twice."""
        return self.moved / max(1, self.ideal)


@dataclass
class Findings:
    """``outside``: loads and stores outside of a kernel's arguments. ``raced``: addresses that one program writes and
    another of the same launch reads or writes. ``traffic``: by kernel."""

    outside: list[str] = field(default_factory=list[str])
    raced: list[str] = field(default_factory=list[str])
    traffic: dict[str, Traffic] = field(default_factory=dict[str, Traffic])


@contextmanager
def interpreting(*modules: ModuleType) -> Generator[Findings]:
    """Kernels that ``modules`` name run in the interpreter and are watched; afterwards they compile again.

    bfloat16 is rounded, and TF32 loses the bits, as on a GPU. Raises MissingPackageError if this Triton's interpreter
    is not the one that is known here.
    """
    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    watch = _Watch()
    with (
        np.errstate(all="ignore"),  # what a mask or tl.where then leaves out is no number, in silence, as on a GPU
        swapped(*modules),
        patch.multiple(
            builder,
            create_masked_load=watch.load(builder.create_masked_load),
            create_masked_store=watch.store(builder.create_masked_store),
            create_dot=_in_tf32(builder.create_dot),
        ),
        patch.multiple(
            executor,
            _init_args_hst=watch.arguments(executor._init_args_hst),
            __call__=watch.launch(executor.__call__),
        ),
    ):
        yield watch.findings


class _Access(NamedTuple):
    """Places that a program reads or writes at once, elements of so many bytes."""

    program: tuple[int, ...]
    places: Any
    width: int


class _Watch:
    """What is known of the launch that runs, and the interpreter's functions with a look at what they are given."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.ranges: list[tuple[int, int]] = []  # of bytes, of the arguments
        self.loads: list[_Access] = []
        self.stores: list[_Access] = []

    def arguments(self, usual: Function) -> Function:
        """The arguments of a launch."""

        def _init(executor: Any, args: Any, kwargs: Any) -> Any:
            ready = usual(executor, args, kwargs)
            self.ranges = list(_storages(ready))
            return ready

        return _init

    def launch(self, usual: Function) -> Function:
        """A launch, all of its programs."""

        def _call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.loads.clear()
            self.stores.clear()
            result = usual(executor, *args, **kwargs)
            name = executor.fn.__name__
            if collision := _collision(self.loads, self.stores):
                self.findings.raced.append(f"{name}: {collision}")
            traffic = self.findings.traffic.setdefault(name, Traffic())
            for accesses in (self.loads, self.stores):
                traffic.moved += sum(a.places.size * a.width for a in accesses)
                traffic.ideal += _distinct(accesses)
            return result

        return _call

    def load(self, usual: Function) -> Function:
        """A load."""

        def _load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            mask = self._inside("load", pointers, mask)
            self.loads.append(_access(builder, pointers, mask))
            return usual(builder, pointers, mask, *rest)

        return _load

    def store(self, usual: Function) -> Function:
        """A store."""

        def _store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            mask = self._inside("store", pointers, mask)
            self.stores.append(_access(builder, pointers, mask))
            return usual(builder, pointers, value, mask, *rest)

        return _store

    def _inside(self, what: str, pointers: Any, mask: Any) -> Any:
        """The mask without what lies outside, which is noted and not done: it would spoil this process's memory."""
        lanes = _lanes(pointers, mask)
        width, inside = pointers.get_element_ty().primitive_bitwidth // 8, np.zeros(lanes.shape, bool)
        for first, last in self.ranges:
            inside |= (pointers.data >= first) & (pointers.data + width <= last)
        wrong = int((lanes & ~inside).sum())
        if not wrong:
            return mask
        self.findings.outside.append(f"{what}: {wrong} of {int(lanes.sum())}")
        return interpreter.TensorHandle(lanes & inside, mask.dtype.scalar)


def _in_tf32(usual: Function) -> Function:
    """The interpreter multiplies TF32 in full; a tensor core drops the last 13 bits."""

    def _dot(builder: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if precision.name == "TF32" and a.dtype.scalar == tl.float32:
            a, b = (interpreter.TensorHandle(_truncated(x.data), x.dtype.scalar) for x in (a, b))
        return usual(builder, a, b, d, precision, *rest)

    return _dot


def _lanes(pointers: Any, mask: Any) -> Any:
    return np.broadcast_to(mask.data, pointers.data.shape).astype(bool)


def _access(builder: Any, pointers: Any, mask: Any) -> _Access:
    width = pointers.get_element_ty().primitive_bitwidth // 8
    return _Access(builder.grid_idx, pointers.data[_lanes(pointers, mask)], width)


def _collision(loads: list[_Access], stores: list[_Access]) -> str:
    """How many addresses one program of a launch has written and another has met; empty if none."""
    written, read = _by_program(stores), _by_program(loads)
    places, times = _unique(list(written.values()))
    twice = places[times > 1]
    met = [np.intersect1d(read[a], written[b]) for a in read for b in written if a != b]
    found = np.union1d(twice, np.concatenate(met)) if met else twice
    return f"{found.size} of {places.size} addresses" if found.size else ""


def _by_program(accesses: list[_Access]) -> dict[tuple[int, ...], Any]:
    """The different places of each program."""
    found: dict[tuple[int, ...], list[Any]] = {}
    for access in accesses:
        found.setdefault(access.program, []).append(access.places)
    return {program: np.unique(np.concatenate(places)) for program, places in found.items()}


def _unique(parts: list[Any]) -> tuple[Any, Any]:
    """Values and how often each comes."""
    return np.unique(np.concatenate(parts) if parts else np.zeros(0, np.uint64), return_counts=True)


def _distinct(accesses: list[_Access]) -> int:
    """Bytes of the different places."""
    found: dict[int, list[Any]] = {}
    for access in accesses:
        found.setdefault(access.width, []).append(access.places)
    return sum(np.unique(np.concatenate(places)).size * width for width, places in found.items())


def _truncated(x: Any) -> Any:
    """float32 with ten bits of mantissa."""
    return (np.ascontiguousarray(x).view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def _storages(x: Any) -> Iterator[tuple[int, int]]:
    """First byte and last plus one of every tensor in nested arguments."""
    if isinstance(x, Tensor) or hasattr(x, "untyped_storage"):
        storage = x.untyped_storage()
        yield storage.data_ptr(), storage.data_ptr() + storage.nbytes()
    elif isinstance(x, dict):
        yield from _storages(tuple(x.values()))
    elif isinstance(x, (tuple, list)):
        for part in x:
            yield from _storages(part)
