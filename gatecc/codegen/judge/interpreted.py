"""Kernels in Triton's interpreter: which accesses leave the tensors that a kernel was given, which programs collide.

The interpreter itself reads garbage outside of tensors, in silence, and runs programs one after the other, so that
races between them stay unseen. It says nothing of warps, barriers and shared memory inside a program.

``TRITON_INTERPRET`` must be set before Triton is imported, and changes what it imports: ``in_own_process`` runs a
module that way, which uses ``watched``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import triton.language as tl
from torch import Tensor
from triton.runtime import interpreter

from gatecc.codegen.judge.bfloat16 import exact_bfloat16

Function = Callable[..., Any]


@dataclass
class Findings:
    """``outside``: loads and stores outside of a kernel's arguments. ``raced``: addresses that two programs write."""

    outside: list[str] = field(default_factory=list[str])
    raced: list[str] = field(default_factory=list[str])


def in_own_process(module: str, folder: Path) -> Any:
    """Run ``python -m module`` in a folder under the interpreter; what it prints is JSON, which is returned."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module]
    run = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError(run.stderr[-3000:])
    return json.loads(run.stdout)


@contextmanager
def watched() -> Generator[Findings]:
    """Watch the launches in the block. bfloat16 is rounded, and TF32 loses the bits, as on a GPU."""
    builder: Any = interpreter.InterpreterBuilder
    executor: Any = interpreter.GridExecutor
    watch = _Watch()
    with (
        exact_bfloat16(),
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
        patch.object(interpreter.InterpretedFunction, "__call__", watch.helper),
    ):
        yield watch.findings


class _Watch:
    """What is known of the launch that runs, and the interpreter's functions with a look at what they are given."""

    def __init__(self) -> None:
        self.findings = Findings()
        self.ranges: list[tuple[int, int]] = []  # of bytes, of the arguments
        self.stores: list[tuple[tuple[int, ...], Any]] = []  # program and addresses
        self.patched: set[int] = set()

    @property
    def helper(self) -> Function:
        """A call of a helper. Upstream patches the language anew for every call: half of the time."""

        def _call(function: Any, *args: Any, **kwargs: Any) -> Any:
            if id(function.fn.__globals__) not in self.patched:
                self.patched.add(id(function.fn.__globals__))
                interpreter._patch_lang(function.fn)
            return function.rewrite()(*args, **kwargs)

        return _call

    def arguments(self, usual: Function) -> Function:
        """The arguments of a launch."""

        def _init(executor: Any, args: Any, kwargs: Any) -> Any:
            ready = usual(executor, args, kwargs)
            self.patched.clear()
            self.ranges = list(_storages(ready))
            return ready

        return _init

    def launch(self, usual: Function) -> Function:
        """A launch, all of its programs."""

        def _call(executor: Any, *args: Any, **kwargs: Any) -> Any:
            self.stores.clear()
            result = usual(executor, *args, **kwargs)
            collision = _collision(self.stores)
            if collision:
                self.findings.raced.append(f"{executor.fn.__name__}: {collision}")
            return result

        return _call

    def load(self, usual: Function) -> Function:
        """A load."""

        def _load(builder: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            return usual(builder, pointers, self._inside("load", pointers, mask), *rest)

        return _load

    def store(self, usual: Function) -> Function:
        """A store."""

        def _store(builder: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
            mask = self._inside("store", pointers, mask)
            self.stores.append((builder.grid_idx, pointers.data[_lanes(pointers, mask)]))
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


def _collision(stores: list[tuple[tuple[int, ...], Any]]) -> str:
    """How many addresses several programs of one launch have written; empty if none."""
    of_program: dict[tuple[int, ...], list[Any]] = {}
    for program, places in stores:
        of_program.setdefault(program, []).append(places)
    written = [np.unique(np.concatenate(places)) for places in of_program.values()]
    if len(written) < 2:
        return ""
    _, times = np.unique(np.concatenate(written), return_counts=True)
    return f"{int((times > 1).sum())} of {times.size} addresses" if (times > 1).any() else ""


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
