"""Scope: a submodule whose forward runs captured, rewritten variants of itself.

The module keeps its identity: its class becomes a dynamic subclass (as torch.nn.utils.parametrize does), its children,
parameter names and methods stay. Each call picks a variant by everything that a graph bakes in; a new kind of call
captures a new variant; a call that cannot be captured takes the Python path; and the unrewritten forward never runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Generator, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import nn
from torch._compile import _disable_dynamo  # torch.compiler.disable, without importing Dynamo for it

from gatecc.capture.reads import Read, recorded_reads
from gatecc.capture.signature import Key, OpaqueArgumentError, autocast, flatten
from gatecc.errors import CallNotCapturedError, CaptureError
from gatecc.ir.rewrite import Rewrite
from gatecc.ir.widen import Rows
from gatecc.scope.dynamo import learn_while_tracing
from gatecc.scope.family import Entry, Family, proves
from gatecc.scope.python_path import PythonPath, run_python
from gatecc.scope.traced import is_traced, outside
from gatecc.scope.variant import Variant
from gatecc.scope.widened import narrowed

STATE = "_gatecc"


@dataclass(frozen=True)
class Application:
    """One rewrite and where it is done in a scope: (owner relative to the scope, ordinal) of each site."""

    rewrite: Rewrite
    sites: tuple[tuple[str, int], ...]


@dataclass(eq=False)
class Scope:
    """The state behind one scoped module, kept in its ``__dict__``; survives deepcopy and pickling with the module."""

    fqn: str
    applied: tuple[Application, ...]
    family: Family = field(default_factory=Family)
    python: PythonPath = field(default_factory=lambda: PythonPath(refused="no call was captured yet"))
    own: set[str] = field(default_factory=set[str])  # paths of the modules that gatecc made in this scope
    refused: dict[Key, str] = field(default_factory=dict[Key, str])  # calls that could not be captured, and why
    trusted: list[Entry] = field(default_factory=list[Entry])  # entries captured on, or proved for, this layer
    widened: dict[str, Rows] = field(default_factory=dict[str, Rows])  # weights of the model that hold new rows

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "refused": {}, "trusted": [], "family": Family()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return Scope(
            self.fqn,
            self.applied,
            self.family,
            self.python,
            set(self.own),
            dict(self.refused),
            list(self.trusted),
            dict(self.widened),
        )


def scope_of(module: nn.Module) -> Scope | None:
    """The scope state of a module, None if it is an ordinary module."""
    return vars(module).get(STATE)


def scopes(model: nn.Module) -> Iterator[tuple[str, nn.Module, Scope]]:
    """Every scoped module of a model: its FQN, the module, its state."""
    for fqn, module in model.named_modules():
        state = scope_of(module)
        if state is not None:
            yield fqn, module, state


def outside_scopes(model: nn.Module) -> list[str]:
    """The FQNs of the modules that no scope holds, and of the outermost scopes: a hook elsewhere keeps a graph from
    running."""
    roots = [f"{fqn}." if fqn else "" for fqn, _, _ in scopes(model)]
    names = [name for name, _ in model.named_modules()]
    return [n for n in names if not any(n.startswith(root) and n != root.removesuffix(".") for root in roots)]


@contextmanager
def plain(model: nn.Module) -> Generator[None]:
    """The model with the modules' own forwards for a while, without what transforms inserted."""
    with ExitStack() as stack:
        for _, module, state in list(scopes(model)):
            stack.enter_context(narrowed(module, state.widened))
            stack.callback(install, module, state)
            module.__class__ = base_class(module)
        yield


@functools.cache
def scoped_class(base: type[nn.Module]) -> type[nn.Module]:
    """The subclass of ``base`` whose forward runs variants. It has the base's name; ``gatecc_base`` is the base."""

    @functools.wraps(base.forward)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        found = lookup(self, args, kwargs)
        if found is None:
            if torch.compiler.is_dynamo_compiling():
                learn_while_tracing(self, args, kwargs, learn)
            return first_call(self, args, kwargs)
        variant, leaves = found
        return variant(self, leaves)

    # Dynamo counts recompilations by code object: each class gets one of its own.
    forward.__code__ = forward.__code__.replace(co_name=f"forward_of_{base.__name__}")  # pyright: ignore[reportAttributeAccessIssue]

    def reduce(self: nn.Module, protocol: Any = None) -> Any:
        return (_new, (base,), self.__getstate__() if hasattr(self, "__getstate__") else vars(self))

    names = {"forward": forward, "__reduce_ex__": reduce, "__module__": base.__module__, "gatecc_base": base}
    return type(base.__name__, (base,), {**names, "__qualname__": base.__qualname__, "__doc__": base.__doc__})


def _new(base: type[nn.Module]) -> nn.Module:
    cls = scoped_class(base)
    return cls.__new__(cls)


def install(module: nn.Module, state: Scope) -> None:
    """Turn a module into a scope in place."""
    module.__class__ = scoped_class(base_class(module))
    vars(module)[STATE] = state


def remove(module: nn.Module) -> None:
    """Turn a scope back into an ordinary module in place (new parameters are the caller's to remove)."""
    module.__class__ = base_class(module)
    vars(module).pop(STATE, None)


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether or not it is a scope."""
    return cast("type[nn.Module]", getattr(type(module), "gatecc_base", type(module)))


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, bound."""
    return functools.partial(base_class(module).forward, module)


def lookup(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Variant, list[torch.Tensor]] | None:
    """The trusted variant for a call and the call's tensors, if there is one. Written so that Dynamo can trace it."""
    state = cast("Scope", getattr(module, STATE))
    try:
        key, leaves = call_key(module, args, kwargs)
    except OpaqueArgumentError:
        return None
    for entry in state.family.find(key, leaves):
        if entry in state.trusted and fresh(entry.variant.reads, module):
            return entry.variant, leaves
    return None


@_disable_dynamo
def first_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A call of a kind that this scope has not seen: share, capture, or take the Python path.

    Dynamo does not trace into it: where `learn` found nothing to do, the graph breaks here.
    """
    state = cast("Scope", getattr(module, STATE))
    try:
        key, leaves = call_key(module, args, kwargs)
    except OpaqueArgumentError as e:
        return _python(module, state, args, kwargs, str(e))
    if key in state.refused:
        return _python(module, state, args, kwargs, state.refused[key])
    if is_traced(leaves):
        return _traced(module, state, key, args, kwargs, leaves)
    try:
        entry = entry_for(module, state, key, args, kwargs, leaves)
    except CaptureError as e:
        state.refused[key] = e.found
        return _python(module, state, args, kwargs, e.found)
    return entry.variant(module, leaves)


def entry_for(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry:
    """An entry of the family that is proved for this layer, or a new capture. Raises CaptureError."""
    from gatecc.scope.build import build

    shared = _share(module, state, key, args, kwargs, leaves)
    if shared is not None:
        return shared
    entry = build(module, state, args, kwargs).entry
    state.family.add(key, entry)
    state.trusted.append(entry)
    return entry


def _share(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry | None:
    """An entry that another layer, or the same call with gradients, has made and that is proved for this one now."""
    for entry in state.family.find(key, leaves):
        with narrowed(module, state.widened):
            proved = entry not in state.trusted and proves(entry, module, base_forward(module), args, kwargs, leaves)
        if proved:
            state.trusted.append(entry)
            return entry
    return _without_gradients(module, state, key, args, kwargs, leaves)


def _without_gradients(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Entry | None:
    """For a call without gradients, the graph of the same call with them, if it is proved to be this call's function.

    Most modules do the same in both, and a proof costs two runs instead of a capture. Not the other way round: a graph
    that was captured without gradients forgets which of its regions had none.
    """
    call, gradients, *modes = key
    if gradients:
        return None
    for known in state.family.find((call, True, *modes), leaves):
        with narrowed(module, state.widened), recorded_reads(module) as seen:
            proved = proves(known, module, base_forward(module), args, kwargs, leaves)
        if proved and seen.keys() <= {(read.path, read.name) for read in known.plain.reads}:
            entry = Entry(known.variant, known.plain)
            entry.layers.add(module)
            state.family.add(key, entry)
            state.trusted.append(entry)
            return entry
    return None


def learn(root: nn.Module, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Make an entry for a call of a scope, and prove it for the layers that share captures with it.

    Those are found under ``root``, and among the layers that the scope's entries were proved for: each layer may be
    compiled by itself. Returns False if the scope knew this call: there is nothing to learn. Raises CaptureError.
    """
    state = cast("Scope", getattr(module, STATE))
    if lookup(module, args, kwargs) is not None:
        return False
    like = {id(m): m for entry in state.trusted for m in entry.layers}
    like |= {id(m): m for _, m, its in scopes(root) if its.family is state.family}
    key, leaves = call_key(module, args, kwargs)
    entry_for(module, state, key, args, kwargs, leaves)
    for other in like.values():
        its = scope_of(other)
        if its is not None and its.family is state.family and lookup(other, args, kwargs) is None:
            _share(other, its, call_key(other, args, kwargs)[0], args, kwargs, leaves)
    return True


def _python(module: nn.Module, state: Scope, args: tuple[Any, ...], kwargs: dict[str, Any], reason: str) -> Any:
    if state.python.refused and reason:
        raise CallNotCapturedError(
            "this call cannot become a graph, and the rewrite cannot be said in Python",
            where=state.fqn or type(module).__name__,
            found=f"{reason}; {state.python.refused}",
            do="call without a cache object (use_cache=False) and without hooks inside the scope; "
            "for generation with constant memory use gatecc.decoder",
        )
    return run_python(state.python, module, base_forward(module), args, kwargs, state.fqn)


def call_key(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Key, list[torch.Tensor]]:
    """Everything that a graph bakes in: the call's structure and constants, grad mode, autocast, the state of each
    submodule.

    Raises OpaqueArgumentError if an argument, or a hook inside the scope, cannot be part of a graph.
    """
    key, leaves = flatten(args, kwargs)
    modes: list[Any] = []
    _modes(module, modes, True)
    if not leaves:
        raise OpaqueArgumentError("a call without tensor arguments")
    return (key, torch.is_grad_enabled(), autocast(leaves), tuple(modes)), leaves


def _modes(module: nn.Module, out: list[Any], root: bool) -> None:
    """Type and training flag of every submodule: swapped submodules (LoRA) and frozen norms change the graph."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    if not root and any(hooks):
        raise OpaqueArgumentError(f"a hook on the submodule {type(module).__name__}")
    out.append(type(module))
    out.append(module.training)
    for child in module._modules.values():
        if child is not None:
            _modes(child, out, False)


def fresh(reads: tuple[Read, ...], module: nn.Module) -> bool:
    """Whether the plain attributes that the capture read still have the values that it baked in."""
    for path, name, value in reads:
        holder = module.get_submodule(path) if path else module
        now = getattr(holder, name, None)
        if now is not value and _differs(now, value):
            return False
    return True


def _differs(now: Any, before: Any) -> bool:
    """Tensors have no one truth value, nor have containers of them: other objects then count as other values."""
    try:
        return isinstance(now, torch.Tensor) or bool(now != before)
    except (RuntimeError, ValueError):
        return True


def _traced(
    module: nn.Module, state: Scope, key: Key, args: tuple[Any, ...], kwargs: dict[str, Any], leaves: list[torch.Tensor]
) -> Any:
    """Inside someone's torch.export: capture outside of it, and run the variant inside."""

    def work(real_args: tuple[Any, ...], real_kwargs: dict[str, Any]) -> Entry:
        real = flatten(real_args, real_kwargs)[1]
        return entry_for(module, state, key, real_args, real_kwargs, real)

    try:
        entry = outside(module, args, kwargs, work)
    except CaptureError as e:
        return _python(module, state, args, kwargs, e.found)
    return entry.variant(module, leaves)
