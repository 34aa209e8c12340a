"""Which plain attributes a capture read, of modules and of the objects that they hold: their values are baked in.

Two layers can share a capture only if every attribute that it read is equal in both; a variant is stale as soon as one
of them changes, also inside a configuration object that is changed in place. ``layer_idx`` of transformers, for
instance, is read only where a cache is used, so it does not count.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from types import MemberDescriptorType, SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from gatecc.capture.snapshot import holds_constants, is_fixed, snapshot

Ties = tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]  # pairs of parameters that are one: the steps to each
Seen = dict[tuple[str, str], "Read"]


class Read(NamedTuple):
    """One attribute: the module's path relative to the captured module; the name, ``config.act`` for an attribute of an
    object that the module holds; the value that was seen."""

    path: str
    name: str
    value: Any
    seen: Any  # its snapshot, or the Kind of an object whose attributes have reads of their own
    fixed: bool = True  # the same object has the same value for ever
    constant: bool = True  # it is made of constants alone

    @classmethod
    def of(cls, path: str, name: str, value: Any) -> Read:
        """A read of a value as it is now."""
        return cls(path, name, value, snapshot(value), is_fixed(value), holds_constants(value))


class Kind(NamedTuple):
    """The class of an object that was looked into."""

    cls: type


class _Recorder:
    """The reads of one capture. A class is swapped for a subclass of the same name whose attribute reads are noted."""

    OBJECTS = 64  # objects that are looked into
    FOREIGN = frozenset(
        ("torch", "lightning", "pytorch_lightning", "lightning_fabric", "accelerate", "logging", "numpy", "functools")
    )  # libraries whose objects hold the state of a run, not the settings of a model

    def __init__(self, seen: Seen) -> None:
        self.seen = seen
        self.written: set[tuple[str, str]] = set()
        self.swapped: list[tuple[Any, type]] = []
        self._places: dict[int, tuple[str, str]] = {}  # where an object was found: module path, and the name so far
        self._made: dict[type, type] = {}
        self._original: dict[type, type] = {}

    def watch(self, holder: Any, path: str, prefix: str) -> None:
        """Note the reads of an object's attributes from now on. Raises TypeError if its class cannot be swapped."""
        cls = type(holder)
        object.__setattr__(holder, "__class__", self._recording(cls))  # also where the class forbids to set attributes
        self.swapped.append((holder, cls))
        self._places[id(holder)] = (path, prefix)

    def _recording(self, cls: type) -> type:
        if cls not in self._made:
            read = cast("Callable[[Any, str], Any]", cls.__getattribute__)
            write = cast("Callable[[Any, str, Any], None]", cls.__setattr__)

            def __getattribute__(holder: Any, name: str) -> Any:  # noqa: N807
                value = read(holder, name)
                if not _is_own(name):
                    self._note(holder, name, value)
                return value

            def __setattr__(holder: Any, name: str, value: Any) -> None:  # noqa: N807
                path, prefix = self._places.get(id(holder), ("", ""))
                self.written.add((path, prefix + name))
                write(holder, name, value)

            methods: dict[str, Any] = {"__getattribute__": __getattribute__, "__setattr__": __setattr__}
            names = {
                **methods,
                "__module__": cls.__module__,
                "__qualname__": cls.__qualname__,
                "__hash__": cls.__hash__,
                "__slots__": (),  # the layout stays
            }
            made = type(cls.__name__, (cls,), names)
            self._made[cls], self._original[made] = made, cls
        return self._made[cls]

    def _note(self, holder: Any, name: str, value: Any) -> None:
        place = self._places.get(id(holder))
        if place is not None and (place[0], place[1] + name) not in self.seen and self._is_read(holder, name, value):
            self._read(place[0], place[1] + name, value)

    def _read(self, path: str, name: str, value: Any) -> None:
        known = id(value) in self._places and not isinstance(value, nn.Module)
        cls = self._original.get(type(value), type(value))
        if known or (self._is_plain_object(value) and self._watched(value, path, f"{name}.")):
            self.seen[path, name] = Read(path, name, value, Kind(cls), fixed=False, constant=False)
        elif isinstance(value, SimpleNamespace):  # its class cannot be swapped: everything in it counts
            self.seen[path, name] = Read(path, name, value, Kind(cls), fixed=False, constant=False)
            for inner, held in vars(value).items():
                self._read(path, f"{name}.{inner}", held)
        else:
            self.seen[path, name] = Read.of(path, name, value)

    def _is_read(self, holder: Any, name: str, value: Any) -> bool:
        """Whether an instance's own attribute was read; names that a configuration maps to others among them."""
        if name in getattr(holder, "__dict__", ()):
            return True
        at_class = getattr(type(holder), name, None)
        if at_class is None:
            return not isinstance(holder, nn.Module) and holds_constants(value)
        return isinstance(at_class, MemberDescriptorType)

    def _is_plain_object(self, value: Any) -> bool:
        cls = type(value)
        if isinstance(value, (*_OTHERS, nn.Module, torch.Tensor)) or is_fixed(value):
            return False
        return bool(cls.__flags__ & _MADE_IN_PYTHON) and cls.__module__.partition(".")[0] not in self.FOREIGN

    def _watched(self, value: Any, path: str, prefix: str) -> bool:
        if len(self._made) > self.OBJECTS:
            return False
        try:
            self.watch(value, path, prefix)
        except Exception:  # a class may refuse to have subclasses, or raise what it likes when it gets one
            return False
        return True


@contextmanager
def recorded_reads(root: nn.Module, seen: Seen | None = None) -> Generator[Seen]:
    """Record the reads of instance attributes of all modules under root, and of plain objects that they hold, while the
    context is open. What was written meanwhile, or has another value afterwards, is left out: the capture did that.

    A module whose class cannot be swapped (slots, extension types) is recorded as having read everything. ``seen`` is
    filled, if it is given: it has the reads of a capture that failed, too.
    """
    recorder = _Recorder({} if seen is None else seen)
    try:
        for path, module in root.named_modules():
            try:
                recorder.watch(module, path, "")
            except TypeError:
                read = {(path, k): Read.of(path, k, v) for k, v in vars(module).items() if not _is_own(k)}
                recorder.seen.update(read)
        yield recorder.seen
    finally:
        for holder, cls in reversed(recorder.swapped):
            object.__setattr__(holder, "__class__", cls)
        for key, read in list(recorder.seen.items()):
            if key in recorder.written or not same(read, value_of(read, root)):
                del recorder.seen[key]


def ties_of(root: nn.Module) -> Ties:
    """The parameters of a module that are one: a graph reads the first of them alone."""
    first: dict[int, str] = {}
    names = [(name, first.setdefault(id(p), name)) for name, p in root.named_parameters(remove_duplicate=False)]
    return tuple((tuple(other.split(".")), tuple(name.split("."))) for name, other in names if name != other)


def _is_own(name: str) -> bool:
    """Whether an attribute belongs to torch's or gatecc's bookkeeping, not to the model."""
    return name in _BOOKKEEPING or name.startswith(("__", "_gatecc"))


def reads_of(seen: Seen) -> tuple[Read, ...]:
    """The recorded reads in a stable order."""
    return tuple(seen.values())


Row = tuple[tuple[str, ...], Any, bool, Read]  # names from the module on, the value, whether it is fixed
Group = tuple[tuple[str, ...], tuple[Row, ...]]


def grouped(reads: tuple[Read, ...]) -> tuple[Group, ...]:
    """Reads by the module that they are of: the steps to it, and the names from it on."""
    by_path: dict[str, list[Row]] = {}
    for read in reads:
        by_path.setdefault(read.path, []).append((tuple(read.name.split(".")), read.value, read.fixed, read))
    return tuple((tuple(path.split(".")) if path else (), tuple(rows)) for path, rows in by_path.items())


def value_of(read: Read, root: nn.Module) -> Any:
    """What an attribute holds now under a root, None if it is not there."""
    value: Any = root
    for name in filter(None, read.path.split(".")):
        value = getattr(value, name, None)
    for name in read.name.split("."):
        value = getattr(value, name, None)
    return value


def same(read: Read, now: Any) -> bool:
    """Whether a value is still the one that was read. Written so that Dynamo can trace it; it compares no versions."""
    if isinstance(read.seen, Kind):
        return type(now) is read.seen.cls
    if now is read.value and (read.fixed or (not read.constant and torch.compiler.is_dynamo_compiling())):
        return True
    return snapshot(now) == read.seen


def same_reads(reads: tuple[Read, ...], root: nn.Module) -> bool:
    """Whether every attribute that was read has an equal value under another (or the same, later) root."""
    return all(same(read, value_of(read, root)) for read in reads)


_MADE_IN_PYTHON = 1 << 9  # Py_TPFLAGS_HEAPTYPE: the class of an object can be swapped
_OTHERS = (type, tuple, list, dict, set, frozenset)
_BOOKKEEPING = frozenset(vars(nn.Module()))  # _parameters, _modules, training, the tables of hooks
