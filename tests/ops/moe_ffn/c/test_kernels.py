"""The C kernels against the ATen form in float64: every layout, sizes that fill no vector, any strides, any threads."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.c import build
from gatecc.codegen.c.build import find_compiler
from gatecc.ops.moe_ffn import moe_ffn, segments
from gatecc.ops.moe_ffn.activations import names
from gatecc.ops.moe_ffn.arguments import Arguments, arguments
from gatecc.ops.moe_ffn.c.kernels import CpuKernels, library
from tests.ops.moe_ffn.cases import operands, to

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
KERNELS = CpuKernels()
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def read(case: dict[str, Any]) -> Arguments:
    options = {name: value for name, value in case.items() if name != "activation"}
    return arguments(**options, activation_text=case.get("activation", "silu"))


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    low = to(case, dtype) | {"weights": case["weights"].float()}
    expected, kept = segments.forward(read(to(low, torch.float64)), keep=True)
    found = KERNELS.forward(read(low), keep=True)
    assert found is not None
    assert kept is not None
    out, hidden = found
    assert hidden is not None
    close(out, expected, dtype)
    close(hidden, kept, dtype)
    grad = torch.randn_like(out)
    biased = case["down_bias"] is not None
    needs = [True, True, True, True, biased, biased]
    gradients = KERNELS.backward(read(low), grad, hidden, needs)
    assert gradients is not None
    truth = segments.backward(read(to(low, torch.float64)), grad.double(), hidden.double(), needs)
    for got, want in zip(gradients, truth, strict=True):
        assert (got is None) == (want is None)
        if got is not None and want is not None:
            close(got, want, dtype if got is not gradients.weights else torch.float32)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    assert found.dtype == dtype
    assert found.shape == expected.shape
    # Terms are about 1: a sum of them that happens to be small is not more exact.
    assert (found.double() - expected).abs().max() <= TOLERANCE[dtype] * (1 + expected.abs().max())


SIZES = st.sampled_from([1, 2, 5, 16, 33, 64, 100])


@settings(max_examples=40, deadline=None)
@given(
    T=st.sampled_from([1, 2, 3, 8, 13, 40, 600]),
    d=SIZES,
    width=SIZES,
    o=SIZES,
    E=st.integers(1, 4),
    k=st.integers(1, 3),
    layout=st.sampled_from(["halves", "interleaved", "plain"]),
    combine=st.sampled_from(["sum", "slots"]),
    biased=st.booleans(),
    turned=st.booleans(),
    threads=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_size(turned: bool, threads: int, dtype: torch.dtype, **sizes: Any) -> None:
    torch.set_num_threads(threads)
    case = operands(**sizes, activation="swiglu" if sizes["layout"] == "interleaved" else "gelu")
    if turned:
        case |= {n: case[n].mT.contiguous().mT for n in ("gate_up", "down")}
    check(case, dtype)


@pytest.mark.parametrize("T", [2, 40])
@pytest.mark.parametrize("activation", names())
def test_activations(activation: str, T: int) -> None:
    case = operands(T=T, d=20, width=20, activation=activation)
    case["x"] *= 6
    check(case, torch.float32)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_sums_over_more_than_a_panel_holds(dtype: torch.dtype) -> None:
    check(operands(T=30, d=1100, width=1060, E=2), dtype)
    check(operands(T=1300, d=20, width=300, E=1, k=1), dtype)


def test_numbers_that_are_none_stay_in_their_rows() -> None:
    case = to(operands(T=40, d=20, width=20, E=2), torch.float32)
    case["indices"] = case["indices"].clamp_max(1)
    case["x"][7, 3] = float("nan")
    case["x"][9, 3] = float("inf")
    assert (~moe_ffn(**case).isfinite()).any(1).nonzero().flatten().tolist() == [7, 9]


def test_a_changed_weight_is_seen() -> None:
    case = to(operands(T=30, d=20, width=20), torch.float32)
    before = moe_ffn(**case)
    case["down"].mul_(2)
    torch.testing.assert_close(moe_ffn(**case), 2 * before)


def test_results_are_where_their_tensors_are() -> None:
    case = to(operands(), torch.float32)
    leaves = [case[name].requires_grad_() for name in ("x", "weights", "down")]
    with torch.device("meta"):
        out = moe_ffn(**case)
        grads = torch.autograd.grad(out.sum(), leaves, torch.ones((), device="cpu"))
    assert {t.device.type for t in (out, *grads)} == {"cpu"}


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_threads_change_no_bit(dtype: torch.dtype) -> None:
    case = to(operands(T=30, d=40, width=90, E=3), dtype)
    case["x"].requires_grad_()
    case["down"].requires_grad_()
    found: list[list[Tensor]] = []
    for threads in (1, 4, 16):
        torch.set_num_threads(threads)
        out = moe_ffn(**case)
        found.append([out, *torch.autograd.grad(out.float().sum(), (case["x"], case["down"]))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flags are those of x86-64")
@pytest.mark.parametrize("machine", ["haswell", "skylake-avx512"])
def test_machines_without_products_of_bfloat16(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if machine == "skylake-avx512" and "avx512f" not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this CPU has no AVX-512")
    monkeypatch.setattr(build, "FLAGS", ((f"-march={machine}", "-fopenmp"),))
    library.cache_clear()
    try:
        for T in (2, 40):
            check(operands(T=T, d=33, width=29, biased=True, activation="gelu"), torch.bfloat16)
    finally:
        library.cache_clear()


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_other_dtypes_are_left_to_aten(dtype: torch.dtype) -> None:
    assert KERNELS.forward(read(to(operands(), dtype)), keep=False) is None
