"""Which plain Python attributes of modules a capture read: the graph has baked their values in.

Two layers can share a capture only if every attribute that it read is equal in both; a variant is stale as soon as one
of them changes. ``layer_idx`` of transformers, for instance, is read only where a cache is used, so it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

from torch import nn


class Read(NamedTuple):
    """One attribute: the module's path relative to the captured module, the name, the value that was seen."""

    path: str
    name: str
    value: Any


@contextmanager
def recorded_reads(root: nn.Module) -> Generator[dict[tuple[str, str], Any]]:
    """Record the reads of instance attributes of all modules under root while the context is open.

    Each module is given a subclass of its own class with a recording ``__getattribute__`` and the same name; a module
    whose class cannot be swapped (slots, extension types) is recorded as having read everything.
    """
    seen: dict[tuple[str, str], Any] = {}
    written: set[tuple[str, str]] = set()
    original: list[tuple[nn.Module, type]] = []
    made: dict[type, type] = {}
    paths = {id(m): path for path, m in root.named_modules()}
    try:
        for path, module in root.named_modules():
            cls = type(module)
            try:
                module.__class__ = made.setdefault(cls, _recording(cls, paths, seen, written))
                original.append((module, cls))
            except TypeError:
                seen.update({(path, k): v for k, v in vars(module).items() if not _is_own(k)})
        yield seen
    finally:
        for module, cls in original:
            module.__class__ = cls
        for key in written & seen.keys():
            del seen[key]


def _recording(
    cls: type, paths: dict[int, str], seen: dict[tuple[str, str], Any], written: set[tuple[str, str]]
) -> type:
    read = cast("Callable[[Any, str], Any]", cls.__getattribute__)
    write = cast("Callable[[Any, str, Any], None]", cls.__setattr__)

    def __getattribute__(self: Any, name: str) -> Any:  # noqa: N807
        value = read(self, name)
        if not _is_own(name) and name in object.__getattribute__(self, "__dict__"):
            seen.setdefault((paths.get(id(self), ""), name), value)
        return value

    def __setattr__(self: Any, name: str, value: Any) -> None:  # noqa: N807
        written.add((paths.get(id(self), ""), name))
        write(self, name, value)

    methods: dict[str, Any] = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
    return type(cls.__name__, (cls,), {**methods, "__module__": cls.__module__, "__qualname__": cls.__qualname__})


def _is_own(name: str) -> bool:
    """Whether an attribute belongs to torch's or gatecc's bookkeeping, not to the model."""
    return name in _BOOKKEEPING or name.startswith(("__", "_gatecc"))


def reads_of(seen: dict[tuple[str, str], Any]) -> tuple[Read, ...]:
    """The recorded reads in a stable order."""
    return tuple(Read(path, name, value) for (path, name), value in seen.items())


def same_reads(reads: tuple[Read, ...], root: nn.Module) -> bool:
    """Whether every attribute that was read has an equal value under another (or the same, later) root."""
    return all(_same(read, root) for read in reads)


def _same(read: Read, root: nn.Module) -> bool:
    module = root.get_submodule(read.path)
    value = vars(module).get(read.name, _MISSING)
    if value is read.value:
        return True
    plain = (bool, int, float, str, tuple, list, dict, type(None))
    return type(value) is type(read.value) and isinstance(value, plain) and bool(value == read.value)


_MISSING = object()
_BOOKKEEPING = frozenset(vars(nn.Module()))  # _parameters, _modules, training, the tables of hooks
