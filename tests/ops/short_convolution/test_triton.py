"""The GPU kernels of short convolutions: in Triton's interpreter, compiled for GPUs, and which calls they take."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.judge.binaries import judge_launch, launches
from gatecc.codegen.judge.compiled import kernel_names, recorded
from gatecc.codegen.judge.interpreted import interpreting
from gatecc.codegen.judge.numbers import judge_numbers
from gatecc.ops.short_convolution.kernels import KERNELS
from gatecc.ops.short_convolution.triton import dispatch as gpu
from gatecc.ops.short_convolution.triton import launch
from gatecc.ops.short_convolution.triton.judged import FAMILY
from tests.ops.short_convolution.test_operator import drawn, exact


@pytest.mark.parametrize(("case", "dtype"), [("a state, fewer tokens than taps", "bf16"), ("one token", "fp32")])
def test_the_judge(case: str, dtype: str) -> None:
    assert judge_numbers(FAMILY, case, dtype).faults == ()


@settings(max_examples=4, deadline=None)
@given(
    sizes=st.tuples(st.integers(1, 2), st.integers(1, 40), st.integers(1, 20), st.integers(2, 5)),
    bias=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from(["identity", "silu"]),
    needs=st.tuples(*[st.booleans()] * 4).filter(any),
)
def test_results_and_gradients(
    sizes: tuple[int, int, int, int], bias: bool, state: bool, activation: str, needs: tuple[bool, ...]
) -> None:
    """Of those tensors that need one."""
    batch, tokens, channels, taps = sizes
    tensors = drawn(batch, tokens, channels, taps, bias=bias, state=state, dtype=torch.float32)
    grad, grad_after = torch.randn(batch, tokens, channels), torch.randn(batch, taps - 1, channels)
    y, after, *grads = exact(tensors, activation, grad, grad_after)
    there = [i for i, t in enumerate(tensors) if t is not None]
    leaves = [None if t is None else t.detach().requires_grad_(needs[i]) for i, t in enumerate(tensors)]
    wanted = [i for i in there if needs[i]]
    with patch.dict(KERNELS, {"cpu": gpu.GpuKernels()}), interpreting(launch) as findings:
        found = torch.ops.gatecc.short_convolution(*leaves, activation=activation)
        got: tuple[Tensor, ...] = ()
        if wanted:
            learned = [t for t in leaves if t is not None and t.requires_grad]
            got = torch.autograd.grad(found, learned, (grad, grad_after))
    assert not findings.outside
    assert not findings.raced
    expected = [y, after, *(grads[there.index(i)] for i in wanted)]
    for one, other in zip((*found, *got), expected, strict=True):
        assert (one.double() - other).abs().max() <= 4e-6 * (1 + other.abs().max())


@pytest.mark.parametrize(("target", "kernel"), [("sm_90", "differentiate")])
def test_it_fits(target: str, kernel: str) -> None:
    made = next(x for x in launches(FAMILY, "2048 tokens", "bf16", target) if x.name == kernel)
    assert judge_launch(FAMILY, made, "2048 tokens", "bf16", target).faults == ()


def test_what_is_launched() -> None:
    """Every kernel; a tile of a step has one token."""
    with recorded("sm_90", launch) as made:
        for start in FAMILY.sizes.values():
            start(torch.bfloat16)
    assert {x.name for x in made} == set(kernel_names(launch))
    assert [x.given["TOKENS"] for x in made] == [32, 32, 32, 1]


DECLINED: dict[str, tuple[dict[str, Any], str]] = {
    "float64": ({"dtype": torch.float64}, "torch.float64 has no kernel"),
    "many taps": ({"taps": 9}, "9 taps"),
    "one tap": ({"taps": 1}, "1 taps"),
    "no tokens": ({"tokens": 0}, "without a number"),
}


@pytest.mark.parametrize("name", DECLINED)
def test_declined(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change, reason = DECLINED[name]
    sizes: dict[str, Any] = {"batch": 2, "tokens": 5, "channels": 6, "taps": 4, "dtype": torch.float32, **change}
    tensors = drawn(**sizes, bias=True, state=False)
    asked: list[str | None] = []
    monkeypatch.setattr(gpu.LAUNCHER, "missing", lambda _: None)
    monkeypatch.setattr(gpu.LAUNCHER, "run", lambda _, reason, *rest, **options: asked.append(reason))
    monkeypatch.setitem(KERNELS, "cpu", gpu.GpuKernels())
    y, _ = torch.ops.gatecc.short_convolution(*tensors)  # in ATen
    assert y.shape == (2, sizes["tokens"], 6)
    assert len(asked) == 1
    assert reason in str(asked[0])
