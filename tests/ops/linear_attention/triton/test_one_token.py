"""The kernel of one token, in the interpreter: by the judge's rule, and behind the operator and the decoder's call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import pytest
import torch

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.interpreted import interpreting
from gatecc.codegen.judge.numbers import judge_numbers
from gatecc.ops.linear_attention import kernels, linear_attention_step
from gatecc.ops.linear_attention.registration import bound
from gatecc.ops.linear_attention.triton.dispatch import STEP, GpuKernels
from gatecc.ops.linear_attention.triton.judged_step import FAMILY


@pytest.mark.parametrize("case", FAMILY.cases)
def test_it_is_right(case: str) -> None:
    for dtype in ("fp32", "fp16") if "grouped" in case else ("bf16",):
        assert judge_numbers(FAMILY, case, dtype).faults == ()


def test_it_holds_its_budgets() -> None:
    (made,) = launches(FAMILY, "gated_delta, D=128", "bf16", "sm_90")
    assert judge_launch(FAMILY, made, "gated_delta, D=128", "bf16", "sm_90").faults == ()


@pytest.fixture
def served() -> Iterator[None]:
    """CPU tensors go to the GPU's kernels, in the interpreter."""
    module: Any = STEP.module()
    with patch.dict(kernels.KERNELS, {"cpu": GpuKernels()}), interpreting(module) as findings:
        yield
    assert (findings.outside, findings.raced) == ([], [])


@pytest.mark.usefixtures("served")
def test_operator_and_decoder_call_it() -> None:
    torch.manual_seed(0)
    q, k, v, g = (
        torch.randn(2, 4, 1, 8),
        torch.randn(2, 2, 1, 8),
        torch.randn(2, 4, 1, 8),
        -torch.rand(1, 4, 1, 1),
    )
    state = torch.randn(2, 4, 8, 8)
    S = g.exp() * state + k.repeat_interleave(2, 1).mT @ v
    wanted = q @ S
    launched = 0

    def counted(*given: Any) -> Any:
        nonlocal launched
        launched += 1
        return step(*given)

    module: Any = STEP.module()
    step = module.step
    with patch.object(module, "step", counted):
        o, after = bound()(q, k, v, g.expand(2, 4, 1, 1), None, state, scale=1.0)
        inside = state.clone()
        q1, k1, v1, g1 = (x.squeeze(2) for x in (q, k, v, g))
        more = linear_attention_step(q1, k1, v1, g1, None, inside, scale=1.0)
    torch.testing.assert_close((o, after), (wanted, S))
    torch.testing.assert_close((more, inside), (wanted.squeeze(2), S))
    assert launched == 3  # a decay for all rows is spread first


@pytest.mark.usefixtures("served")
def test_what_it_does_not_take_is_computed_in_aten() -> None:
    for D, dtype in ((4, torch.float64), (300, torch.float32)):
        q, state = torch.randn(1, 1, D, dtype=dtype), torch.zeros(1, 1, D, D, dtype=dtype)
        assert GpuKernels().step(q, q, q, None, None, state, state, 1.0) is None
        o = linear_attention_step(q, q, q, None, None, state, scale=1.0)
        torch.testing.assert_close(o, q * q.square().sum())
