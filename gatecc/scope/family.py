"""Family: layers of one structure, which share their captures. Sharing is proved per layer, never assumed."""

from __future__ import annotations

import warnings
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from gatecc.capture.adapters import fast_path_off
from gatecc.capture.kept import attributes_kept
from gatecc.capture.neutral import neutral_weights
from gatecc.capture.reads import same_reads
from gatecc.capture.shield import callers_device, random_states_kept
from gatecc.capture.signature import Key, map_tensors
from gatecc.ir.hooks import silenced
from gatecc.scope.variant import Variant

LIMIT = 64  # kinds of call kept per family; the oldest goes first
OF_ONE_KIND = 16  # captures kept for calls of one kind, which differ in the sizes or attributes that they bake in


@dataclass(eq=False)
class Entry:
    """One captured call: the rewritten variant, and the plain one (before any rewrite) that proofs are made with."""

    variant: Variant
    plain: Variant
    layers: weakref.WeakSet[nn.Module] = field(default_factory=weakref.WeakSet)  # made on, or proved for (not copies)
    seconds: dict[str, float] = field(default_factory=dict[str, float])  # what making it took, by step


@dataclass(eq=False)
class Family:
    """The shared variants by call key. A family is never copied or pickled with its layers: copies go on sharing it."""

    entries: OrderedDict[Key, list[Entry]] = field(default_factory=OrderedDict[Key, list[Entry]])

    def add(self, key: Key, entry: Entry) -> None:
        of_kind = self.entries.setdefault(key, [])
        of_kind.append(entry)
        if len(of_kind) > OF_ONE_KIND:
            del of_kind[0]
            _warn(
                f"calls of one kind needed more than {OF_ONE_KIND} captures, for other sizes or attributes of modules"
            )
        if len(self.entries) > LIMIT:
            self.entries.popitem(last=False)
            _warn(f"a scope was called in more than {LIMIT} ways")

    def holds(self, entry: Entry) -> bool:
        """Whether an entry has not been dropped."""
        return any(entry in of_kind for of_kind in self.entries.values())

    def find(self, key: Key, leaves: Sequence[torch.Tensor]) -> list[Entry]:
        """The entries whose sizes fit, in the order of their captures."""
        return [e for e in self.entries.get(key, ()) if e.variant.accepts(leaves)]

    def __deepcopy__(self, memo: dict[int, Any]) -> Family:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return (Family, ())


def _warn(what: str) -> None:
    warnings.warn(f"{what}; the oldest capture is dropped, and made again if it is needed", stacklevel=4)


def structure(module: nn.Module) -> tuple[Any, ...]:
    """What two layers must have in common before a proof is tried: types, shapes, dtypes, aliasing of all tensors."""
    names: dict[int, str] = {}
    tensors = [
        (name, tuple(t.shape), t.dtype, t.requires_grad, names.setdefault(id(t), name))
        for name, t in (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    ]
    return (tuple((path, type(m)) for path, m in module.named_modules()), tuple(tensors))


def proves(
    entry: Entry,
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    leaves: Sequence[torch.Tensor],
) -> bool:
    """Whether the entry's plain graph is this layer's function: equal attributes read, and equal outputs on this call.

    The layer runs twice from the same random state, on copies of the inputs, which it may change in place. Its buffers
    are restored after each run, and no gradient is taken. torch's fused paths are off, as they were in the capture:
    they differ where a batch is padded, and the graphs run in their place.
    """
    if not same_reads(entry.plain.reads, module):
        return False
    buffers = [(b, b.clone()) for b in module.buffers()]
    results: list[Any] = []
    its_args, its_kwargs = map_tensors(torch.clone, (args, kwargs))
    its_leaves = [x.clone() for x in leaves]
    for run in (lambda: forward(*its_args, **its_kwargs), lambda: entry.plain(module, its_leaves)):
        with (
            attributes_kept(module),
            silenced(module),
            neutral_weights(module),
            random_states_kept(),
            torch.no_grad(),
            callers_device(),
            fast_path_off(),
        ):
            results.append(run())
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
    if not same_outputs(results[0], results[1], 1e-5) or _recorded(results[0]) != _recorded(results[1]):
        return False
    entry.layers.add(module)
    return True


def _recorded(output: Any) -> list[bool]:
    """Which output tensors carry gradients all the same: a forward may switch them on for itself."""
    return [isinstance(x, torch.Tensor) and x.requires_grad for x in pytree.tree_leaves(output)]


def same_outputs(a: Any, b: Any, tolerance: float) -> bool:
    """Whether two outputs have the same structure and tensors equal up to tolerance * max|a|."""
    left, spec = pytree.tree_flatten(a)
    right, other = pytree.tree_flatten(b)
    return spec == other and all(close(x, y, tolerance) for x, y in zip(left, right, strict=True))


def close(x: Any, y: Any, tolerance: float) -> bool:
    """Tensors: same shape and dtype, small difference where finite, NaN and infinity at the same places. Else:
    equal."""
    if not (isinstance(x, torch.Tensor) and isinstance(y, torch.Tensor)):
        return bool(type(x) is type(y) and (x is y or x == y))
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if x.is_meta and y.is_meta:  # there are no values to tell them apart
        return True
    if not x.is_floating_point():
        return bool(torch.equal(x, y))
    return difference(x, y, floor=torch.finfo(torch.float32).tiny) <= tolerance


def difference(x: torch.Tensor, y: torch.Tensor, floor: float = 1.0) -> float:
    """max|x - y| / max(floor, max|x|) over finite entries; infinite if non-finite entries differ or shapes do."""
    if x.shape != y.shape:
        return float("inf")
    if x.numel() == 0:
        return 0.0
    if not (x.is_floating_point() or x.is_complex()):  # booleans have no minus, unsigned integers wrap around
        x, y = x.double(), y.double()
    finite = torch.isfinite(x)
    same = torch.where(finite, torch.isfinite(y), (x == y) | (x.isnan() & y.isnan()))
    if not bool(same.all()):
        return float("inf")
    gap = torch.where(finite, (x - y).abs(), 0).max()
    scale = torch.where(finite, x.abs(), 0).max().double().clamp(min=floor)
    return float((gap.double() / scale).item())
