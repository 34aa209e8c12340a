"""Scope: a submodule whose forward runs captured, rewritten variants of itself.

The module keeps its identity: its class becomes a dynamic subclass (as torch.nn.utils.parametrize does), its children,
parameter names and methods stay. The unrewritten forward never runs. A call goes like this:

    call --> key.py: everything that a graph bakes in
               |  (an argument that no graph can hold: Python path)
               v
             dispatch.py: a trusted entry with this key, its reads unchanged? ---- yes --> run its variant
               | no
               v
             refused before, for the same reason? ---------------------------- yes --> Python path
               | no
               v
             learn.py: an entry of another layer, or of this call with gradients,
                       that is proved to be this layer's function? ------------ yes --> trust it, run its variant
               | no
               v
             build.py: capture, prepare, rewrite, verify ------------------- done --> new entry, trusted; run it
               | CaptureError, remembered in refusals.py
               v
             python_path.py: the same edits on the running call ------ impossible --> CallNotCapturedError (GCC006)

Under torch.export and torch.compile the first question is traced along, and learning happens outside of the trace
(traced.py, dynamo.py).
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import nn

from gatecc.ir.weights import suspended
from gatecc.scope.dispatch import first_call, known
from gatecc.scope.dynamo import learn_while_tracing
from gatecc.scope.learn import learn
from gatecc.scope.state import STATE, Scope, base_class, drop_bound_forward, scopes


@contextmanager
def plain(model: nn.Module) -> Generator[None]:
    """The model with the modules' own forwards for a while, without what transforms inserted."""
    with ExitStack() as stack:
        for _, module, state in list(scopes(model)):
            stack.enter_context(suspended(module, state.changes))
            stack.callback(setattr, module, "__class__", type(module))
            drop_bound_forward(module)
            if "forward" in vars(module):  # a wrapper of the scope's forward, which runs the base's without a state
                stack.callback(vars(module).__setitem__, STATE, vars(module).pop(STATE))
            module.__class__ = base_class(module)
        yield


@functools.cache
def scoped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward runs variants. It has the base's name; ``gatecc_base`` is the base."""

    @_named_like(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if STATE not in self.__dict__:  # reverted, but a wrapper of another library holds this function still
            return base.forward(self, *args, **kwargs)
        found = known(self, args, kwargs)
        if found is None:
            if torch.compiler.is_dynamo_compiling():
                learn_while_tracing(self, args, kwargs, learn)
            return first_call(self, args, kwargs)
        variant, leaves = found
        return variant(self, leaves)

    # Dynamo counts recompilations by code object: each class gets one of its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_of_{base.__name__}")

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return (_new, (base,), self.__getstate__() if hasattr(self, "__getstate__") else vars(self))

    names = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "gatecc_base": base}
    return type(base.__name__, (base,), {**names, "__qualname__": base.__qualname__, "__doc__": base.__doc__})


def _named_like(base: Callable[..., Any]) -> Callable[[Any], Any]:
    """functools.wraps, but for ``__wrapped__`` and the attributes of ``base``, some of which lead to functions too.

    Who takes a decorator off by following such an attribute (accelerate's unwrap_model, inspect.unwrap, Dynamo) would
    come out at the unrewritten forward. The signature stays that of ``base``.
    """

    def name(forward: Any) -> Any:
        functools.update_wrapper(forward, base, updated=())
        del forward.__wrapped__
        with suppress(TypeError, ValueError):  # a forward that was compiled in C++ has none
            forward.__signature__ = inspect.signature(base)
        return forward

    return name


def _new(base: type[nn.Module]) -> nn.Module:
    cls = scoped_class(base)
    return cls.__new__(cls)


def install(module: nn.Module, state: Scope) -> None:
    """Turn a module into a scope in place; one whose class is a subclass of a scope's is one already."""
    drop_bound_forward(module)
    if not hasattr(type(module), "gatecc_base"):
        module.__class__ = scoped_class(type(module))
    vars(module)[STATE] = state


def remove(module: nn.Module) -> None:
    """Turn a scope back into an ordinary module in place (new parameters are the caller's to remove)."""
    drop_bound_forward(module)
    module.__class__ = base_class(module)
    vars(module).pop(STATE, None)
