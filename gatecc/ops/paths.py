"""Paths: what a run takes of a model whose work depends on values, told while it runs to whoever watches.

An operator says it in its entry of the registry (``Operator.taken``); Python code that leaves something out, such as an
ensemble that calls the members that somebody chose, calls `note`. Both are silent and free while nobody watches.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Taken(NamedTuple):
    """What one call took: ``counts[i]`` times unit i, each of which might have been taken ``of`` times.

    ``kind`` is the word for a unit: "expert", "member", "block", "channel", "exit", "token". Where it stands is told by
    its ``site``, an FQN; else by ``tensors``, the weights that the units share, whose names are looked up in the model;
    else by the module whose rewritten graph runs. ``units`` are names of the units, if they have any.
    """

    kind: str
    counts: Sequence[int]
    of: int
    tensors: Sequence[Tensor] = ()
    site: str = ""
    units: Sequence[str] = ()


Watcher = Callable[[Taken, nn.Module | None], None]
"""``watcher(taken, module)``: the module whose rewritten graph runs, None outside of all of them."""
_WATCHERS: list[Watcher] = []
_INSIDE: list[nn.Module] = []
_WHOLE: list[None] = []


def is_watched() -> bool:
    """Whether it is worth counting."""
    return bool(_WATCHERS)


def note(taken: Taken) -> None:
    """Tell those who watch, if there are any."""
    for watcher in _WATCHERS:
        watcher(taken, _INSIDE[-1] if _INSIDE else None)


@contextmanager
def watched(watcher: Watcher) -> Generator[None]:
    """Tell a watcher of everything that is taken."""
    _WATCHERS.append(watcher)
    try:
        yield
    finally:
        _WATCHERS.remove(watcher)


@contextmanager
def inside(module: nn.Module) -> Generator[None]:
    """The rewritten graph of a module runs."""
    _INSIDE.append(module)
    try:
        yield
    finally:
        _INSIDE.pop()


def is_whole() -> bool:
    """Whether nothing may be left out now: Python code that decides by values takes its masked form."""
    return bool(_WHOLE)


@contextmanager
def whole() -> Generator[None]:
    """Everything is computed for a while, and what is not taken is masked."""
    _WHOLE.append(None)
    try:
        yield
    finally:
        _WHOLE.pop()
