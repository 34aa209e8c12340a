"""The C kernels against the ATen form in float64: every option, sizes that fill no vector, any strides, any threads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.codegen.c.build import find_compiler
from gatecc.ops.attention import attention, kernels, reference
from gatecc.ops.attention.arguments import arguments
from gatecc.ops.attention.c.kernels import CpuKernels
from tests.ops.attention.cases import operands, to

pytestmark = pytest.mark.skipif(find_compiler() is None, reason="no C compiler")
KERNELS = CpuKernels()
TOLERANCE = {torch.float32: 5e-6, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    low = {
        n: x.to(dtype) if n in ("q", "k", "v") else x.float() if n == "sinks" else x
        for n, x in case.items()
        if x is not None
    }
    expected, sums = reference.attention(arguments(**to(low, torch.float64)))
    found = KERNELS.forward(arguments(**low))
    assert found is not None
    assert found[0].dtype == dtype
    close(found[0], expected, dtype)
    assert torch.equal(found[1] == -torch.inf, sums == -torch.inf)
    sees = sums > -torch.inf
    close(found[1].where(sees, 0.0), sums.where(sees, 0.0), dtype)
    if low.get("blocks") is not None:
        return  # its gradients are ATen's
    grad, of_sums = torch.randn_like(found[0]), torch.where(sees, torch.randn_like(found[1]), 0.0)
    needs = [low.get(name) is not None and name != "bias" for name in ("q", "k", "v", "gate", "bias", "sinks")]
    gradients = KERNELS.backward(arguments(**low), *found, grad, of_sums, needs)
    truth = kernels.differentiate(arguments(**to(low, torch.float64)), grad.double(), of_sums.double(), needs)
    assert gradients is not None
    for one, other in zip(gradients, truth, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            close(one, other, dtype, times=8)  # of the result as it was rounded: differences of sums over features


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, times: float = 1) -> None:
    assert found.shape == expected.shape
    # Terms are about 1: a sum of them that happens to be small is not more exact.
    assert (found.double() - expected).abs().max() <= times * TOLERANCE[dtype] * (1 + expected.abs().max())


BIASES: tuple[dict[str, Any], ...] = (
    {},
    {"bias": "hnm"},
    {"bias": "m"},
    {"hidden": "bhnm"},
    {"seen": "bm"},
    {"bias": "n"},
)


@settings(max_examples=60, deadline=None)
@given(
    N=st.sampled_from([1, 2, 5, 6, 33, 64, 200, 300]),
    more=st.sampled_from([0, 0, 0, 1, 70, 300, -3]),
    D=st.sampled_from([1, 8, 20, 64, 65]),
    E=st.sampled_from([1, 8, 20, 64, 100]),
    G=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 1, 10, 100]),
    softcap=st.sampled_from([None, 2.0]),
    gate=st.sampled_from(["", "head", "element"]),
    gate_activation=st.sampled_from(["identity", "sigmoid", "silu"]),
    bias=st.sampled_from(BIASES),
    sinks=st.booleans(),
    turned=st.booleans(),
    narrow=st.booleans(),
    threads=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_every_size(
    N: int,
    more: int,
    E: int,
    gate: str,
    bias: dict[str, Any],
    turned: bool,
    narrow: bool,
    threads: int,
    dtype: Any,
    **o: Any,
) -> None:
    torch.set_num_threads(threads)
    S = max(N + more, 1)
    shapes = {
        name: tuple(n if axis in of else 1 for axis, n in zip("bhnm", (2, 4, N, S), strict=True))
        for name, of in bias.items()
    }
    case = operands(N=N, S=S, E=E, gate={"": 0, "head": 1, "element": E}[gate], **shapes, **o)
    for name in ("q", "k", "v", "gate") if turned else ():  # heads beside each other, as projections give them
        case[name] = None if case[name] is None else case[name].transpose(1, 2).contiguous().transpose(1, 2)
    if narrow:  # gates and biases of the operands' own dtype
        case |= {n: case[n].to(dtype) for n in ("gate", "bias") if case[n] is not None and case[n].dtype != torch.bool}
    check(case, dtype)


@settings(max_examples=40, deadline=None)
@given(
    N=st.sampled_from([1, 5, 40, 200, 300]),
    more=st.sampled_from([0, 0, 70, 300]),
    D=st.sampled_from([8, 20, 64]),
    E=st.sampled_from([8, 65]),
    G=st.sampled_from([1, 2, 4]),
    causal=st.booleans(),
    window=st.sampled_from([None, None, 100]),
    bias=st.sampled_from(BIASES[:5]),
    sinks=st.booleans(),
    sizes=st.tuples(st.sampled_from([1, 16, 37, 64, 256]), st.sampled_from([1, 3, 16, 50, 64, 128])),
    own=st.tuples(st.sampled_from([1, 2]), st.sampled_from([1, 4])),
    share=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    threads=st.sampled_from([1, 3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_maps_of_blocks(
    N: int,
    more: int,
    bias: dict[str, Any],
    sizes: tuple[int, int],
    own: tuple[int, int],
    share: float,
    threads: int,
    dtype: Any,
    **o: Any,
) -> None:
    torch.set_num_threads(threads)
    S = N + more
    shapes = {
        name: tuple(n if axis in of else 1 for axis, n in zip("bhnm", (2, 4, N, S), strict=True))
        for name, of in bias.items()
    }
    case = operands(N=N, S=S, **shapes, **o)
    case["blocks"] = torch.rand(*own, -(-N // sizes[0]), -(-S // sizes[1])) < share
    case["block_sizes"] = sizes
    check(case, dtype)


def test_keys_of_blocks_that_are_left_out_are_not_read() -> None:
    case = to(operands(B=1, H=2, G=1, N=70, S=300, D=16), torch.float32)
    case["blocks"] = torch.zeros(1, 2, 2, 5, dtype=torch.bool)
    case["blocks"][0, 0, 0, 1] = case["blocks"][0, 1, 1, 3] = True
    case["block_sizes"] = (35, 64)
    for name in ("k", "v"):
        for column in (0, 2, 4):
            case[name][:, :, 64 * column : 64 * column + 64] = torch.nan
    out, logsumexp = attention(**case)
    assert out.isfinite().all()
    assert torch.equal(out.abs().sum(-1) > 0, logsumexp > -torch.inf)
    assert (logsumexp > -torch.inf).view(2, 2, 35).all(-1).tolist() == [[True, False], [False, True]]


@pytest.mark.parametrize(("scale", "softcap"), [(1e-3, 30.0), (1.0, 30.0), (30.0, None), (1e4, 30.0)])
def test_large_scores_and_caps_are_as_exact_as_in_aten(scale: float, softcap: float | None) -> None:
    case = to(operands(N=70, D=16, G=2, causal=True, softcap=softcap, scale=scale), torch.float32)
    exact = reference.attention(arguments(**to(case, torch.float64)))
    eager, mine = reference.attention(arguments(**case)), KERNELS.forward(arguments(**case))
    assert mine is not None
    for found, plain, truth in zip(mine, eager, exact, strict=True):
        errors = [(x.double() - truth).norm() for x in (found, plain)]
        assert errors[0] <= 2 * errors[1] + 1e-7 * truth.norm()


def test_numbers_that_are_none_stay_in_their_rows() -> None:
    case = to(operands(B=1, H=2, N=40, D=16, causal=True), torch.float32)
    case["q"][0, 0, 7, 3] = float("nan")
    case["k"][0, 1, 39, 3] = float("nan")
    out, logsumexp = attention(**case)
    for found in ((~out.isfinite()).any(-1), ~logsumexp.isfinite()):
        assert found.nonzero().tolist() == [[0, 0, 7], [0, 1, 39]]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("options", [{"causal": True, "window": 50}, {"causal": True, "window": 250}, {"window": 333}])
def test_threads_change_no_bit(dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Jobs of fewer queries begin at other keys of a window."""
    case = to(operands(B=1, N=700, S=800, D=20, G=2, **options), dtype)
    mapped: dict[str, Any] = {**case, "blocks": torch.rand(1, 1, 700 // 35, 16) < 0.7, "block_sizes": (35, 50)}
    for call in (case, mapped):
        found: list[tuple[Tensor, ...]] = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(attention(**call))
        for other in found[1:]:
            assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "window": 250}, {"window": 70}])
def test_threads_change_no_bit_of_a_gradient(options: dict[str, Any]) -> None:
    """Blocks of keys of one head that run at once add to the same queries."""
    a = arguments(**to(operands(B=1, H=2, G=1, N=700, S=800, D=8, **options), torch.float32))
    torch.set_num_threads(1)
    results = KERNELS.forward(a)
    assert results is not None
    found: list[Any] = []
    for threads in (1, 2, 3, 5):
        torch.set_num_threads(threads)
        found.append(KERNELS.backward(a, *results, a.q, None, [True] * 3 + [False] * 3))
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0][:3], other[:3], strict=True))
