"""Kept: what a forward writes on its modules beside tensors is as it was afterwards.

A forward may fill a cache, count its calls or keep its last output; in a capture these would be fake tensors, which no
later call can use.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

from torch import nn

_BOOKKEEPING = frozenset(vars(nn.Module()))


@contextmanager
def attributes_kept(module: nn.Module) -> Generator[None]:
    """The plain attributes of all modules, and what the dicts, lists and sets among them hold, as they were."""
    tables = [(vars(m), _own(vars(m))) for m in module.modules()]
    contents: dict[int, tuple[Any, Any]] = {}
    for _, own in tables:
        for value in own.values():
            _note(value, contents)
    try:
        yield
    finally:
        for container, before in contents.values():
            _restore(container, before)
        for table, own in tables:
            for name in _own(table).keys() - own.keys():
                del table[name]
            table.update(own)


def _own(table: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in table.items() if k not in _BOOKKEEPING and not k.startswith("_gatecc")}


def _note(value: Any, contents: dict[int, tuple[Any, Any]]) -> None:
    """Copy a container and those in it. Others than Python's own may have rules for what they hold."""
    if type(value) not in (dict, list, set) or id(value) in contents:
        return
    contents[id(value)] = (value, value.copy())
    for inner in value.values() if type(value) is dict else value:
        _note(inner, contents)


def _restore(container: Any, before: Any) -> None:
    """Refill it, unless it holds the same objects."""
    if [*map(id, container)] == [*map(id, before)] and (
        type(container) is not dict or [*map(id, container.values())] == [*map(id, before.values())]
    ):
        return
    container.clear()
    container.extend(before) if type(container) is list else container.update(before)
