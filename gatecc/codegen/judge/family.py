"""Families: kernels that belong to one launcher, and by what the judge tries them.

Whoever has kernels says so with ``register``, in a module of its own that is imported when somebody judges. The judge
knows no operator.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, Literal

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Budget = Literal["spills", "matrix", "vector", "traffic", "error"]


@dataclass(frozen=True)
class Exemption:
    """A budget that a kernel does not hold, what it may take instead, and why.

    ``kernel``: its name, of "error" that of a case. ``most`` counts epsilons of the dtype for "error", bytes moved of
    bytes met for "traffic", accesses for "spills"; for "matrix" (instructions) and "vector" (bytes of the widest
    access) it is the least. Empty ``dtypes``, ``sizes`` and ``targets`` stand for all; a target may be the first
    letters of several ("sm_", "gfx").
    """

    kernel: str
    budget: Budget
    most: float
    why: str
    dtypes: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    targets: tuple[str, ...] = ()

    def covers(self, kernel: str, budget: Budget, dtype: str, size: str = "", target: str = "") -> bool:
        """Whether it speaks of this."""
        return (
            (self.kernel, self.budget) == (kernel, budget)
            and (not self.dtypes or dtype in self.dtypes)
            and (not self.sizes or size in self.sizes)
            and (not self.targets or target.startswith(self.targets))
        )


@dataclass(frozen=True, kw_only=True)
class Family:
    """Kernels of one launcher.

    launcher: the module that names them.
    cases: by name, what draws a call: tensors on the CPU, floating-point ones in float64, and options. Drawn after a
        fixed seed, small: an interpreter runs them.
    run: a call in the dtype that its tensors have, by the kernels: results and gradients by name.
    reference: the same in ATen, in any dtype.
    dtypes: those that the kernels are for.
    sizes: by name, what launches the kernels on tensors without data for inputs of a dtype: what is compiled.
    cancelled: of a call in float64, by name: for results that are sums of which little may be left, the sum of their
        terms' sizes over the size of their sum. So many epsilons they may err.
    """

    name: str
    launcher: str
    cases: Mapping[str, Callable[[], dict[str, Any]]]
    run: Callable[[dict[str, Any]], dict[str, Tensor]]
    reference: Callable[[dict[str, Any]], dict[str, Tensor]]
    sizes: Mapping[str, Callable[[torch.dtype], object]]
    exemptions: tuple[Exemption, ...] = ()
    dtypes: tuple[str, ...] = tuple(DTYPES)
    cancelled: Callable[[dict[str, Any]], Mapping[str, float]] = lambda given: {}

    def module(self) -> ModuleType:
        """The launcher; imports Triton."""
        return import_module(self.launcher)

    def exemption(self, kernel: str, budget: Budget, dtype: str, size: str = "", target: str = "") -> Exemption | None:
        """The first that speaks of this; None if the usual budget holds."""
        return next((e for e in self.exemptions if e.covers(kernel, budget, dtype, size, target)), None)


_MODULES = ["gatecc.codegen.regions.judged"]  # and what operators register


def register(module: str) -> None:
    """Let a module say what is judged: it has FAMILY, or families(). It is imported when somebody judges."""
    if module not in _MODULES:
        _MODULES.append(module)


def families() -> Iterator[Family]:
    """All families that are registered."""
    for name in modules():
        yield from families_of(name)


def modules() -> tuple[str, ...]:
    """The modules that say what is judged."""
    return tuple(_MODULES)


@cache
def families_of(module: str) -> tuple[Family, ...]:
    """The families that a module speaks of."""
    found = import_module(module)
    return tuple(found.families()) if hasattr(found, "families") else (found.FAMILY,)
