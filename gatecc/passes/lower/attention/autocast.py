"""Whether operators of a program run in the precision that it records."""

from __future__ import annotations

import torch

from gatecc.ir.program import Program


def autocasts(program: Program) -> bool:
    """Whether operators may run in another precision than the graph records."""
    around = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda"))
    return around or any(getattr(n.target, "__name__", "") == "_enter_autocast" for n in program.calls())
