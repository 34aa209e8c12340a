"""measured: what ran in a call on the example inputs, where that depends on data: operations, and who meets which
parameter.

A graph with experts shows slots, not which of them are empty, and a graph with blocks that samples skip shows all of
them. So the model is run once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatecc.capture.adapters import adapted
from gatecc.capture.flops import counted
from gatecc.capture.shield import callers_device, random_states_kept
from gatecc.capture.signature import copied
from gatecc.engine.put_off import on_meta
from gatecc.ir.program import Program
from gatecc.ops import paths, registry
from gatecc.pipeline.cost import by_data
from gatecc.scope.state import scopes


@dataclass
class Measured:
    """``flops`` of one call; the ``met`` share of tokens or samples that meets a tensor, by where its memory is."""

    flops: int | None = None
    met: dict[int, list[tuple[int, int]]] = field(default_factory=lambda: defaultdict(list))

    def share(self, tensor: Tensor) -> float | None:
        """The share of an expert's tokens, or of a block's samples, that meets a parameter; of stacked experts the mean
        over them. None: it was not watched."""
        seen = self.met.get(_place(tensor))
        return sum(some for some, _ in seen) / max(sum(every for _, every in seen), 1) if seen else None


def measured(model: nn.Module, programs: Iterable[Program], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Measured:
    """Run a model once, if what it computes depends on data; else nothing is measured."""
    chooses = any(e.variant.by_data for _, _, s in scopes(model) for e in s.trusted) or any(map(by_data, programs))
    found = Measured()
    if not chooses or on_meta(model):
        return found

    def call() -> Any:
        torch.manual_seed(0)
        its_args, its_kwargs = copied((args, kwargs))
        with _Slots(found), paths.watched(lambda taken, _: _samples(found, taken)):
            return model(*its_args, **its_kwargs)

    with adapted(model), random_states_kept(), callers_device():
        found.flops = counted(call)[1]
    return found


class _Slots(TorchDispatchMode):
    """Watches the operators with experts: how many of the slots that tokens could fill hold one."""

    def __init__(self, found: Measured) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        entry = registry.find(func)
        if entry is not None and entry.served is not None:
            served = entry.served(*args, **(kwargs or {}))
            if served is not None:
                _note(self.found, *served)
        return func(*args, **(kwargs or {}))


def _samples(found: Measured, taken: paths.Taken) -> None:
    """Blocks that samples skip are whole: their parameters are met by so many of the samples."""
    if taken.kind == "block":
        _note(found, taken.tensors, sum(taken.counts), taken.of * len(taken.counts))


def _note(found: Measured, tensors: Iterable[Tensor], some: int, every: int) -> None:
    for tensor in tensors:
        found.met[_place(tensor)].append((some, every))


def _place(tensor: Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except RuntimeError:  # a subclass that wraps others (a quantised weight) has no memory of its own
        return id(tensor)


def shares(model: nn.Module, found: Measured) -> Iterator[tuple[str, float]]:
    """The parameters that were watched, and the share that met each."""
    for name, parameter in model.named_parameters():
        share = found.share(parameter)
        if share is not None:
            yield name, share
