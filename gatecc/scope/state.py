"""State: what gatecc keeps on a scoped module, and how to find it."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn

from gatecc.ir.mask import Mask
from gatecc.ir.scoped import STATE as STATE
from gatecc.ir.weights import Effect
from gatecc.pipeline import Application
from gatecc.scope.family import Entry, Family
from gatecc.scope.masks import Proved
from gatecc.scope.python_path import PythonPath
from gatecc.scope.refusals import Refusals


@dataclass(eq=False)
class Scope:
    """The state behind one scoped module, kept in its ``__dict__``; survives deepcopy and pickling with the module."""

    fqn: str
    applied: tuple[Application, ...]
    family: Family = field(default_factory=Family)
    python: PythonPath = field(default_factory=lambda: PythonPath(refused="no call was captured yet"))
    own: set[str] = field(default_factory=set[str])  # paths of the modules that gatecc made in this scope
    refused: Refusals = field(default_factory=Refusals)  # calls that could not be captured, and why
    trusted: list[Entry] = field(default_factory=list[Entry])  # entries captured on, or proved for, this layer
    changes: list[Effect] = field(default_factory=list[Effect])  # taken back while the module's own forward runs
    masks: Proved = field(default_factory=dict[tuple[str, int], Mask])  # of its attention sites, where it was proved

    def trust(self, entry: Entry) -> None:
        """Run an entry from now on; those that the family has dropped go."""
        self.trusted = [known for known in self.trusted if self.family.holds(known)]
        self.trusted.append(entry)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "refused": Refusals(), "trusted": [], "family": Family()}

    def __deepcopy__(self, memo: dict[int, Any]) -> Scope:
        return Scope(
            self.fqn,
            self.applied,
            self.family,
            self.python,
            set(self.own),
            Refusals(),
            list(self.trusted),
            list(self.changes),
            dict(self.masks),
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


def forward_hides_class(module: nn.Module) -> bool:
    """Whether a module has a forward of its own, so that a rewritten forward of its class would not run."""
    forward = vars(module).get("forward")
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward


def drop_bound_forward(module: nn.Module) -> None:
    """Take away a forward on the module itself that is that of its class; accelerate's unwrap_model leaves such."""
    if "forward" in vars(module) and not forward_hides_class(module):
        del module.forward


def base_class(module: nn.Module) -> type[nn.Module]:
    """The module's own class, whether or not it is a scope."""
    return _without_scope(type(module))


@functools.cache
def _without_scope(cls: type) -> type[nn.Module]:
    """A class without the scope in it. Others put subclasses of their own on top of a scope's class: fully_shard, and
    register_parametrization where the weight lies on the scope itself; these stay.

    Not their forward: transformers wraps that of each subclass of a layer, and the wrapper leads to the scope's."""
    base = getattr(cls, "gatecc_base", None)
    if base is None or "gatecc_base" in vars(cls):
        return base or cls
    own = {k: v for k, v in vars(cls).items() if k not in ("forward", "__dict__", "__weakref__")}
    return cast("type[nn.Module]", type(cls.__name__, tuple(map(_without_scope, cls.__bases__)), own))


def base_forward(module: nn.Module) -> Callable[..., Any]:
    """The module's own forward, bound."""
    base = getattr(type(module), "gatecc_base", type(module))
    return functools.partial(base.forward, module)
