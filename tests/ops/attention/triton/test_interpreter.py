"""The GPU kernels of attention in Triton's interpreter: values, gradients, what they read."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.judge.interpreted import interpreting
from gatecc.codegen.judge.numbers import judge_numbers
from gatecc.ops.attention import attention
from gatecc.ops.attention.kernels import KERNELS
from gatecc.ops.attention.triton import launch
from gatecc.ops.attention.triton.dispatch import GpuKernels
from gatecc.ops.attention.triton.judged import CASES, FAMILY
from tests.ops.attention.cases import leaves, operands, to, wanted


@pytest.mark.parametrize("case", CASES)
def test_the_judge(case: str) -> None:
    assert judge_numbers(FAMILY, case, "fp32").faults == ()


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("case", ["window, sinks, groups", "one query"])
def test_the_judge_on_16_bits(case: str, dtype: str) -> None:
    assert judge_numbers(FAMILY, case, dtype).faults == ()


def _both(call: dict[str, Any]) -> tuple[list[Tensor], list[Tensor]]:
    """Results and gradients by the kernels in float32, and in float64."""
    found: list[list[Tensor]] = []
    for values, kernels in ((leaves(to(call, torch.float32)), GpuKernels()), (leaves(call), None)):
        with patch.dict(KERNELS, {} if kernels is None else {"cpu": kernels}):
            out, logsumexp = attention(**values)
            sees = torch.where(logsumexp > -torch.inf, logsumexp, 0.0)
            direction = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(out.dtype)
            grads = torch.autograd.grad((out * direction).sum() + sees.square().sum(), wanted(values))
        found.append([x.detach() for x in (out, sees, *grads)])
    return found[0], found[1]


@settings(max_examples=5, deadline=None)
@given(
    sizes=st.tuples(*(st.integers(1, 40) for _ in range(4))),
    group=st.sampled_from([1, 2]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    softcap=st.none() | st.just(1.5),
    gate=st.sampled_from(["", "head", "channel"]),
    added=st.sampled_from(["", "bias", "hidden", "seen"]),
    shared=st.tuples(*(st.booleans() for _ in range(4))),
    blocks=st.booleans(),
    sinks=st.booleans(),
)
def test_drawn_calls(
    sizes: tuple[int, int, int, int],
    group: int,
    gate: str,
    added: str,
    shared: tuple[bool, ...],
    blocks: bool,
    **options: Any,
) -> None:
    """Any sizes, any options together; queries that see nothing among them."""
    torch.manual_seed(0)
    N, S, D, E = sizes
    shape = tuple(1 if one else size for one, size in zip(shared, (1, 2, N, S), strict=True))
    call = operands(1, 2, N, D, S=S, E=E, G=2 // group, gate={"": 0, "head": 1, "channel": E}[gate], **options)
    extra: dict[str, Any] = {added: shape} if added else {}
    if added:
        call |= {"bias": operands(1, 2, N, D, S=S, **extra)["bias"]}
    if blocks:
        map_shape = (shape[0], shape[1], -(-N // 16), -(-S // 32))
        call |= {"blocks": torch.rand(map_shape) < 0.6, "block_sizes": (16, 32), "gate_activation": "sigmoid"}
    with interpreting(launch) as findings:
        found, truth = _both(call)
    for mine, exact in zip(found, truth, strict=True):
        torch.testing.assert_close(mine.double(), exact, rtol=2e-5, atol=2e-5 * (1 + float(exact.abs().max())))
    assert (findings.outside, findings.raced) == ([], [])


@pytest.mark.parametrize("N", [64, 1])
def test_closed_blocks_are_not_read(N: int) -> None:
    """Bytes moved grow by one block of keys and values for each that is open; what is closed may hold anything."""
    call: dict[str, Any] = to(operands(1, 2, N, 16, S=256, G=1), torch.float32)
    rows = -(-N // 32)
    maps = torch.zeros(1, 1, rows, 8, dtype=torch.bool), torch.rand(1, 1, rows, 8) < 0.5
    moved: list[int] = []
    for blocks in maps:
        with interpreting(launch) as findings, patch.dict(KERNELS, {"cpu": GpuKernels()}), torch.no_grad():
            attention(**call, blocks=blocks, block_sizes=(32, 32))
        moved.append(findings.traffic["attend" if N > 1 else "attend_part"].moved)
    programs = 2 if N > 1 else 1  # one query: the heads of a group read together
    opened = int(maps[1].sum()) * programs
    assert moved[1] - moved[0] == opened * (32 * (16 + 16) * 4 + 4)  # and the place in a list
    closed = ~maps[1].repeat_interleave(32, -1).any(-2)[0, 0]
    spoilt: dict[str, Any] = {**call, **{n: torch.where(closed[:, None], torch.nan, call[n]) for n in ("k", "v")}}
    with interpreting(launch), patch.dict(KERNELS, {"cpu": GpuKernels()}), torch.no_grad():
        found = attention(**spoilt, blocks=maps[1], block_sizes=(32, 32))
    expected = attention(**to(call, torch.float64), blocks=maps[1], block_sizes=(32, 32))
    assert closed.any() or N > 1
    torch.testing.assert_close(found[0].double(), expected[0], rtol=1e-5, atol=1e-5)


def test_heads_of_a_group_share_the_keys_of_a_step() -> None:
    """One query of eight heads over one head of keys: each key is read once."""
    call = to(operands(1, 8, 1, 16, S=200, G=1), torch.float32)
    with interpreting(launch) as findings, patch.dict(KERNELS, {"cpu": GpuKernels()}), torch.no_grad():
        attention(**call)
    assert findings.traffic["attend_part"].ratio < 1.2  # of what there is once, the queries come again for each part
