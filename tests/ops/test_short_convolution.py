"""gatecc::short_convolution is conv1d padded on the left, with every derivative, for few tokens and many."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ops.short_convolution.c import kernels


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str) -> Tensor:
    """The sum over taps, token by token, in float64."""
    x, w, taps = x.double(), weight.double()[:, 0], weight.size(2)
    y = torch.zeros_like(x)
    for t in range(x.size(1)):
        for j in range(taps):
            if t - taps + 1 + j >= 0:
                y[:, t] += w[:, j] * x[:, t - taps + 1 + j]
    y = y if bias is None else y + bias.double()
    return F.silu(y) if activation == "silu" else y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("taps", [2, 3, 4])
@pytest.mark.parametrize("activation", ["identity", "silu"])
def test_the_sum_over_taps(taps: int, activation: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for batch, tokens, channels in ((3, 2, 16), (1, 1, 5), (3, 70, 37), (2, 0, 16)):
        x = torch.randn(batch, tokens, 2 * channels, dtype=dtype)[..., channels:]  # a part of a projection
        weight, bias = torch.randn(channels, 1, taps, dtype=dtype), torch.randn(channels, dtype=dtype)
        for b in (bias, None):
            found = torch.ops.gatecc.short_convolution(x, weight, b, activation)
            expected = exact(x, weight, b, activation)
            assert (found.shape, found.dtype, found.is_contiguous()) == (x.shape, dtype, True)
            accuracy = 2e-6 if dtype == torch.float32 else 2**-8  # of a bfloat16: half a step of 2**-7
            assert torch.allclose(found.double(), expected, rtol=accuracy, atol=accuracy)
            if x.numel():
                assert kernels.forward(x, weight, b, activation == "silu") is not None  # no fallback was compared


def test_it_learns_and_maps() -> None:
    torch.manual_seed(0)
    x, weight, bias = (torch.randn(*s, dtype=torch.float64) for s in ((2, 5, 3), (3, 1, 4), (3,)))
    given = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(lambda *a: torch.ops.gatecc.short_convolution(*a, "silu"), given)
    x, weight, bias = (t.detach().float() for t in given)
    mapped = torch.func.vmap(lambda one: torch.ops.gatecc.short_convolution(one[None], weight, bias, "silu")[0])(x)
    assert torch.allclose(mapped, torch.ops.gatecc.short_convolution(x, weight, bias, "silu"), atol=1e-5)


def test_the_operator_is_one_to_torch() -> None:
    x, weight = torch.randn(2, 7, 6), torch.randn(6, 1, 4)
    torch.library.opcheck(torch.ops.gatecc.short_convolution.default, (x.transpose(0, 1), weight, None, "silu"))
