"""The kernels in Triton's interpreter, against float64: the cases of test_interpreter.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from gatecc.codegen.judge.interpreted import Findings, interpreting
from gatecc.ops.moe_ffn import moe_ffn
from gatecc.ops.moe_ffn.activations import names
from gatecc.ops.moe_ffn.kernels import KERNELS
from gatecc.ops.moe_ffn.triton import launch
from gatecc.ops.moe_ffn.triton.dispatch import GpuKernels
from tests.ops.moe_ffn.cases import leaves, operands, to, wanted

Errors = dict[str, float]


def judged(given: dict[str, Any], dtype: torch.dtype = torch.float32) -> Errors:
    """The largest error of the result, with and without gradients kept, and of every gradient, of the largest value."""
    given = to(given, dtype)
    found, truth = (_run(leaves(to(given, kind))) for kind in (dtype, torch.float64))
    errors = {name: relative(found[name], truth[name]) for name in found}
    with torch.no_grad():
        errors["without gradients"] = relative(moe_ffn(**given), truth["y"])
    return errors


def _run(given: dict[str, Any]) -> dict[str, Tensor]:
    y = moe_ffn(**given)
    direction = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view(y.shape).to(y.dtype)
    names = [name for name, x in given.items() if isinstance(x, Tensor) and x.requires_grad]
    grads = torch.autograd.grad(y, wanted(given), direction)
    return {"y": y.detach(), **dict(zip(names, grads, strict=True))}


def relative(found: Tensor, truth: Tensor) -> float:
    """Largest error relative to the largest value. NaN counts as infinite."""
    error = (found.double() - truth).abs().max() / truth.abs().max().clamp_min(1e-300)
    return float(error.nan_to_num(nan=float("inf")))


def transposed() -> Errors:
    """No gate, the slots themselves, weights that lie the other way round, an expert without a row."""
    given = operands(9, 24, 40, 4, 3, 12, layout="plain", activation="relu2", combine="slots")
    for name in ("gate_up", "down"):
        given[name] = given[name].mT.contiguous().mT
    given["indices"] = given["indices"].where(given["indices"] != 1, 2)
    return judged(given)


def empty() -> Errors:
    """Slots that are all empty but one; their weights are no numbers, and an index is out of range."""
    given = operands(5, 16, 16, 3, 2, biased=True)
    given["indices"] = torch.full((5, 2), 3)
    given["indices"][2, 1] = 1
    given["weights"] = torch.full((5, 2), torch.nan).double()
    given["weights"][2, 1] = 0.5
    errors = judged(given)
    with torch.no_grad():
        beyond = given["indices"].where(given["indices"] == 1, 77)
        single = to({**given, "indices": beyond}, torch.float32)
        errors["out of range"] = relative(moe_ffn(**single), moe_ffn(**given))
    return errors


def every_activation() -> Errors:
    """Fused into the first kernel."""
    errors: Errors = {}
    for name in [*names(), "leaky_relu(slope=0.3)", "swiglu(alpha=1.0, limit=inf)"]:
        given = operands(6, 8, 9, 2, 1, activation=name, biased=True)
        given["gate_up"] = 4 * given["gate_up"]
        with torch.no_grad():
            errors[name] = relative(moe_ffn(**to(given, torch.float32)), moe_ffn(**given))
    return errors


def half(dtype: torch.dtype) -> Errors:
    """16-bit inputs; the errors are in units of what the dtype resolves."""
    errors = judged(operands(20, 32, 24, 3, 2, biased=True), dtype)
    return {name: error / torch.finfo(dtype).eps for name, error in errors.items()}


CASES: dict[str, Any] = {
    "few rows": lambda: judged(operands(7, 20, 24, 5, 2, 12, biased=True)),
    "some rows": lambda: judged(operands(50, 40, 70, 2, 1, layout="interleaved", activation="swiglu", biased=True)),
    "many rows": lambda: judged(operands(96, 16, 16, 1, 2, activation="gelu")),
    "one token": lambda: judged(operands(1, 72, 16, 4, 2)),
    "transposed": transposed,
    "empty": empty,
    "activations": every_activation,
    "bfloat16": lambda: half(torch.bfloat16),
    "float16": lambda: half(torch.float16),
}


@dataclass(frozen=True)
class Run:
    """The errors of a case by name, and what the judge has found."""

    errors: Errors
    findings: Findings


def run(name: str) -> Run:
    """One case, by the kernels."""
    torch.manual_seed(0)
    with interpreting(launch) as findings, patch.dict(KERNELS, {"cpu": GpuKernels()}):
        return Run(CASES[name](), findings)
