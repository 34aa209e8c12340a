"""The judge finds what it is there to find: one fault in a kernel, on GPUs of both makers and in the interpreter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from triton.runtime import interpreter
from triton.runtime.jit import JITFunction

from gatecc.codegen.judge import bfloat16, swapped
from gatecc.codegen.judge.compiled import TARGETS, Launch, Resources, compile_launch, faults, recorded
from gatecc.codegen.judge.interpreted import interpreting
from gatecc.errors import MissingPackageError
from tests.codegen.judge import kernels


def launched(target: str, *, wide: bool = False) -> Launch:
    """A launch of a product of 32 x 32, recorded on tensors without data."""
    x = torch.empty(32, 32, dtype=torch.bfloat16, device="meta")
    launcher: Any = kernels
    with recorded(target, kernels) as found:
        launcher.product[(1,)](x, x, torch.empty(32, 32, device="meta"), 0.5, WIDE=wide, N=32, num_warps=4)
    (made,) = found
    return made


@pytest.mark.parametrize("target", TARGETS)
def test_a_product_is_compiled_for_every_gpu(target: str) -> None:
    assert faults(compile_launch(launched(target), target), target) == []


def test_double_precision_is_found() -> None:
    for target in ("sm_90", "gfx942"):
        (fault,) = faults(compile_launch(launched(target, wide=True), target), target)
        assert "float64" in fault


def test_spills_are_found() -> None:
    """128 by 128 values in one warp of AMD's: 256 for each thread, which has 512 registers, and as many beside them."""
    launcher: Any = kernels
    x = torch.empty(1, device="meta")
    with recorded("gfx942", kernels) as found:
        launcher.held[(1,)](x, x, N=128, num_warps=1)
    (fault,) = faults(compile_launch(found[0], "gfx942"), "gfx942")
    assert "spilled" in fault


def test_each_budget_is_held() -> None:
    right = Resources(registers=64, spills=0, shared=1024, threads=128, dots=1, matrix=4, double=0, vector=16)
    assert faults(right, "sm_80") == []
    for change, word in (
        ({"spills": 3}, "spilled"),
        ({"shared": 164 * 1024}, "shared memory"),
        ({"threads": 2048}, "threads"),
        ({"matrix": 0}, "matrix units"),
        ({"vector": 8}, "at once"),
    ):
        (fault,) = faults(right._replace(**change), "sm_80")
        assert word in fault
    assert faults(right._replace(matrix=0, dots=0), "sm_80") == []
    assert faults(right._replace(matrix=0, spills=3, vector=2), "sm_80", matrix=0, spills=3, vector=2) == []


@pytest.mark.parametrize(
    ("masked", "step", "outside", "raced"),
    [
        (True, 8, [], []),
        (False, 8, ["load: 4 of 8", "store: 4 of 8"], []),
        (True, 6, [], ["copied: 4 of 20 addresses"]),
    ],
)
def test_the_interpreter_is_watched(masked: bool, step: int, outside: list[str], raced: list[str]) -> None:
    run: Any = kernels
    with interpreting(kernels) as found:
        run.copied[(3,)](torch.arange(20.0), torch.zeros(20), 20, BLOCK=8, MASKED=masked, STEP=step)
    assert (found.outside, found.raced) == (outside, raced)
    assert found.traffic["copied"].ideal == 160
    assert found.traffic["copied"].moved == (160 if step == 8 else 192)


def test_a_program_that_reads_what_another_writes() -> None:
    run: Any = kernels
    with interpreting(kernels) as found:
        run.shifted[(2,)](torch.arange(17.0), BLOCK=8)
    assert found.raced == ["shifted: 1 of 16 addresses"]


def test_bfloat16_is_rounded_as_torch_does() -> None:
    torch.manual_seed(0)
    run: Any = kernels
    x, y = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    out = x.new_empty(3, 16, 16)
    with interpreting(kernels):
        run.halves[(1,)](x, y, out, N=16)
    assert torch.equal(out, torch.stack([x * y, (x.float() * y + x).bfloat16(), x @ y]))


def test_compiling_goes_on_between_interpretations() -> None:
    run: Any = kernels
    x, out = torch.randn(32, 32).bfloat16(), torch.zeros(32, 32)
    for _ in range(2):
        with interpreting(kernels):
            run.product[(1,)](x, x, out, 0.5, WIDE=True, N=32)
        torch.testing.assert_close(out, 0.5 * (x.float() @ x.float()) + (0.5 * (x.float() @ x.float())).sum(1, True))
        assert isinstance(kernels.product, JITFunction)
        assert faults(compile_launch(launched("sm_80"), "sm_80"), "sm_80") == []


def test_another_interpreter_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreter.InterpreterBuilder, "unary_op", None)
    monkeypatch.setattr(bfloat16, "_narrow", lambda x: x)
    swapped.check.cache_clear()
    try:
        with pytest.raises(MissingPackageError, match="the judge"), interpreting(kernels):
            pass
    finally:
        monkeypatch.undo()
        swapped.check.cache_clear()
