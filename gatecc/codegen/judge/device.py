"""A case of a family on a device that is there: its errors against float64, and which kernels ran.

The interpreter knows nothing of warps, barriers and the compiler; a device does. What it takes is what `numbers` takes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.compiled import kernel_names
from gatecc.codegen.judge.family import DTYPES, Family
from gatecc.codegen.judge.numbers import Numbers, beyond, compared, in_dtype


def judge_on_device(family: Family, case: str, dtype: str, device: torch.device) -> Numbers:
    """Run a case on a device. References run on the CPU. A case that no kernel of the family ran is a fault."""
    torch.manual_seed(0)
    narrow = in_dtype(family.cases[case](), DTYPES[dtype])
    there = {name: x.to(device) if isinstance(x, Tensor) else x for name, x in narrow.items()}
    with counted(family.module()) as launches:
        found = family.run(there)
    errors, exempt = compared(family, case, dtype, narrow, {name: x.cpu() for name, x in found.items()})
    faults = [*beyond(errors), *(() if launches else ("no kernel ran",))]
    return Numbers(family.name, case, dtype, tuple(errors), {}, tuple(faults), exempt)


@contextmanager
def counted(launcher: ModuleType) -> Generator[Counter[str]]:
    """How often each kernel that a launcher's module names is launched."""
    launches: Counter[str] = Counter()

    class Counting:
        def __init__(self, name: str) -> None:
            self.name, self.kernel = name, getattr(launcher, name)

        def __getitem__(self, grid: Any) -> Any:
            launches[self.name] += 1
            return self.kernel[grid]

        def __getattr__(self, name: str) -> Any:
            return getattr(self.kernel, name)

    with ExitStack() as stack:
        for name in kernel_names(launcher):
            stack.enter_context(patch.object(launcher, name, Counting(name)))
        yield launches
