"""Spent: the operations and bytes of a run as it runs, which units it takes, and its time beside that of the full path.

The full path is a second run in which nothing is left out: rows and members are masked (`paths.whole`), and operators
whose work depends on values count with every unit. Its time is measured with their masked forms in their place.
"""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

from gatecc.ops import paths, registry
from gatecc.ops.registry import Operator
from gatecc.pipeline.cost import moved
from gatecc.report.cost import TakenRow

_CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default  # torch has no formula for it
_ALLOCATES = ("aten::empty", "aten::new_empty")
_TORCH = ("aten", "prims", "prim", "profiler", "_c10d_functional")  # what has no formula there has no products
Call = Callable[[], Any]


class Meter(TorchDispatchMode):
    """Adds up what operators do. With ``whole``, those whose work depends on values count with every unit."""

    def __init__(self, *, whole: bool = False) -> None:
        super().__init__()
        self.whole = whole
        self.flops, self.bytes = 0, 0
        self.uncounted: dict[str, None] = {}
        self.chose: dict[Operator, None] = {}  # operators that left something out, or might have

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if isinstance(func, OpOverload):
            entry = registry.find(func)
            slots = self._slots(entry, args, kwargs, out)
            self.flops += self._flops(func, entry, slots, args, kwargs, out)
            self.bytes += self._bytes(func, entry, slots, args, kwargs, out)
        return out

    def _slots(self, entry: Operator | None, args: Any, kwargs: Any, out: Any) -> int | None:
        if entry is None or entry.served is None:
            return None
        served = entry.served(*args, **kwargs)
        if served is None:
            return None
        tensors, some, every = served
        self.chose[entry] = None
        if paths.is_watched():
            took = entry.taken(*args, **kwargs, out=out) if entry.taken is not None else None
            paths.note(took or paths.Taken("slot", (some,), every, tensors))
        return every if self.whole else some

    def _flops(
        self, func: OpOverload, entry: Operator | None, slots: int | None, args: Any, kwargs: Any, out: Any
    ) -> int:
        if entry is not None and entry.flops is not None:
            shapes, named = pytree.tree_map_only(Tensor, lambda x: x.shape, (args, kwargs))
            return entry.flops(*shapes, **named, **({} if slots is None else {"slots": slots}))
        if func is _CPU_ATTENTION:
            return sdpa_flop_count(*(x.shape for x in args[:3]))
        formula = flop_registry.get(func._overloadpacket)
        if formula is not None:
            return formula(*args, **kwargs, out_val=out)
        if func.namespace not in _TORCH and (entry is None or entry.flops is None):
            self.uncounted[str(func)] = None
        return 0

    def _bytes(
        self, func: OpOverload, entry: Operator | None, slots: int | None, args: Any, kwargs: Any, out: Any
    ) -> int:
        if entry is not None and entry.bytes is not None:
            if not self.whole or slots is None:
                return entry.bytes(*args, **kwargs)
            args, kwargs = pytree.tree_map_only(Tensor, lambda x: x.to("meta"), (args, kwargs))
            return entry.bytes(*args, **kwargs, **({"slots": slots} if _takes_slots(entry.bytes) else {}))
        if func._schema.name.startswith(_ALLOCATES):
            return 0
        return moved(func, [x for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)], out)


@cache
def _takes_slots(formula: Callable[..., int]) -> bool:
    return "slots" in inspect.signature(formula).parameters


@dataclass
class Profile:
    """What was taken in a run, by site."""

    model: nn.Module
    rows: dict[str, TakenRow] = field(default_factory=dict[str, TakenRow])

    def __post_init__(self) -> None:
        tensors = (*self.model.named_parameters(remove_duplicate=False), *self.model.named_buffers())
        self._tensors = {_place(t): name for name, t in reversed(tensors)}
        self._modules = {id(module): name for name, module in self.model.named_modules()}

    def note(self, taken: paths.Taken, module: nn.Module | None) -> None:
        """A watcher (`paths.watched`). Calls of one site are added up; of a site that nothing names, each is a row."""
        site = taken.site or _common([self._tensors.get(_place(t), "") for t in taken.tensors])
        if not site:
            number = sum(key.startswith(f"{id(module)} {taken.kind} ") for key in self.rows)
            site = (
                f"{self._modules.get(id(module), '')}#{number}" if number or not module else self._modules[id(module)]
            )
            key = f"{id(module)} {taken.kind} {number}"
        else:
            key = f"{site} {taken.kind} {len(taken.counts)}"
        old = self.rows.get(key)
        counts = tuple(taken.counts)
        if old is not None:
            counts = tuple(a + b for a, b in zip(old.counts, counts, strict=True))
        of = taken.of + (old.of if old is not None else 0)
        self.rows[key] = TakenRow(site, taken.kind, counts, of, tuple(taken.units))


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # a subclass that wraps others has no memory of its own
        return id(tensor)


def _common(names: Sequence[str]) -> str:
    """The module that holds all of these parameters, "" if there is none or one of them has no name."""
    if not names or not all(names):
        return ""
    owners = [name.split(".")[:-1] for name in names]
    steps = takewhile(lambda parts: len(set(parts)) == 1, zip(*owners, strict=False))
    return ".".join(parts[0] for parts in steps)


def metered(call: Call, model: nn.Module, *, whole: bool = False) -> tuple[Meter, Profile]:
    """Run a call and add up what it does."""
    profile = Profile(model)
    with ExitStack() as stack:
        if whole:
            stack.enter_context(paths.whole())
        else:
            stack.enter_context(paths.watched(profile.note))
        meter = stack.enter_context(Meter(whole=whole))
        call()
    return meter, profile


@contextmanager
def masked_forms(operators: Iterable[Operator], device: str) -> Generator[None]:
    """Operators compute every unit for a while, by the masked forms of their entries."""
    key = {"cpu": "CPU", "cuda": "CUDA"}.get(device, "PrivateUse1" if device == "privateuseone" else device.upper())
    with ExitStack() as stack:
        for entry in operators:
            namespace, name = entry.overload._schema.name.split("::")
            library = stack.enter_context(torch.library._scoped_library(namespace, "IMPL"))
            library.impl(name, entry.masked, key)
        yield


def fastest(calls: Sequence[Call], rounds: int, device: torch.device) -> list[float]:
    """The least wall time of each call in seconds, taken in turns so that what disturbs one disturbs all."""
    best = [float("inf")] * len(calls)
    for _ in range(rounds):
        for i, call in enumerate(calls):
            _settle(device)
            clock = time.perf_counter()
            call()
            _settle(device)
            best[i] = min(best[i], time.perf_counter() - clock)
    return best


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
