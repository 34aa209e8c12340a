"""Triton's interpreter for a while, in a process that compiles before and afterwards.

``TRITON_INTERPRET`` decides at import, for good. Here kernels and the parts of the language that are kernels themselves
(sum, zeros, sigmoid) change places with interpreted ones, and come back.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import triton
import triton.language as tl
from triton import knobs
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from gatecc.codegen.judge import probe
from gatecc.codegen.judge.bfloat16 import exact_bfloat16
from gatecc.errors import MissingPackageError

_LANGUAGE = (tl, tl.core, tl.standard, tl.math, tl.random)


@contextmanager
def swapped(*modules: ModuleType) -> Generator[None]:
    """Kernels that ``modules`` name, and those that these call, run in the interpreter; bfloat16 is rounded.

    Raises MissingPackageError if this Triton's interpreter is not the one that is known here.
    """
    check()
    with _swapped(*modules):
        yield


@cache
def check() -> None:
    """Run a kernel that needs all that is replaced: the interpreter promises none of it. Raises as ``swapped``."""
    try:
        with _swapped(probe):
            why = "" if probe.works(probe.probe) else "computes something else"
    except (AttributeError, TypeError, interpreter.InterpreterError) as error:
        why = f"{type(error).__name__}: {error}"
    if why:
        raise MissingPackageError(
            "the interpreter of this Triton is not the one that the judge knows",
            found=f"triton {triton.__version__}: {why}",
            expected="triton 3.8 or 3.9",
            do="judge kernels with one of these; they run with others",
        )


@contextmanager
def _swapped(*modules: ModuleType) -> Generator[None]:
    usual: Any = interpreter._patch_lang
    everything = SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    with ExitStack() as stack:
        stack.enter_context(knobs.runtime.scope())
        knobs.runtime.interpret = True
        for names in _namespaces(modules):
            kernels = {name: value for name, value in names.items() if isinstance(value, JITFunction)}
            names.update({name: _of(kernel) for name, kernel in kernels.items()})
            stack.callback(names.update, kernels)
        methods = {name: _method(value) for name, value in vars(tl.tensor).items() if isinstance(value, JITFunction)}
        stack.enter_context(patch.multiple(tl.tensor, **methods))
        # Upstream patches the language for a launch, and again for every helper that it calls: half of the time, and
        # what a helper has patched stays.
        stack.enter_context(patch.object(interpreter, "_patch_lang", lambda _: usual(everything)))
        stack.enter_context(patch.object(interpreter.InterpretedFunction, "__call__", _helper))
        stack.enter_context(exact_bfloat16())
        yield


def _namespaces(modules: tuple[ModuleType, ...]) -> list[dict[str, Any]]:
    """The names of modules and of the language, those that the kernels among them see, and so on."""
    found: dict[int, dict[str, Any]] = {}
    left = [vars(module) for module in (*_LANGUAGE, *modules)]
    while left:
        names = left.pop()
        if id(names) not in found:
            found[id(names)] = names
            left += [value.fn.__globals__ for value in names.values() if isinstance(value, JITFunction)]
    return list(found.values())


@cache
def _of(kernel: Any) -> Any:
    """The interpreted form, one for each kernel: the interpreter knows reductions by their identity."""
    return interpreter.InterpretedFunction(kernel.fn)


def _method(kernel: Any) -> Any:
    return lambda *args, **kwargs: _of(kernel)(*args, **kwargs)


def _helper(function: Any, *args: Any, **kwargs: Any) -> Any:
    return function.rewrite()(*args, **kwargs)
