"""gatecc::short_convolution is conv1d padded on the left, with every derivative, in pieces as at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.ops.short_convolution import short_convolution
from gatecc.ops.short_convolution.c.kernels import CpuKernels
from gatecc.ops.short_convolution.kernels import KERNELS

Drawn = list[Tensor | None]


def drawn(batch: int, tokens: int, channels: int, taps: int, *, bias: bool, state: bool, dtype: torch.dtype) -> Drawn:
    x = torch.randn(batch, tokens, 2 * channels, dtype=dtype)[..., channels:]  # a part of a projection
    weight = torch.randn(channels, 1, taps, dtype=dtype)
    before = torch.randn(channels, batch, taps - 1, dtype=dtype).permute(1, 2, 0)
    return [x, weight, torch.randn(channels, dtype=dtype) if bias else None, before if state else None]


def exact(tensors: Drawn, activation: str, grad: Tensor, grad_after: Tensor) -> list[Tensor]:
    """Results and gradients of torch's conv1d, padded by hand, in float64."""
    leaves = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    x, weight, bias, state = leaves
    assert x is not None
    assert weight is not None
    before = x.new_zeros(x.size(0), weight.size(2) - 1, x.size(2)) if state is None else state
    joined = torch.cat([before, x], 1)
    y = F.conv1d(joined.transpose(1, 2), weight, bias, groups=x.size(2)).transpose(1, 2)
    y, after = F.silu(y) if activation == "silu" else y, joined[:, x.size(1) :]
    grads = torch.autograd.grad((y, after), [t for t in leaves if t is not None], (grad.double(), grad_after.double()))
    return [y, after, *grads]


@settings(max_examples=40)
@given(
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 140), st.integers(1, 40), st.sampled_from([4, 7])),
    short=st.booleans(),
    bias=st.booleans(),
    state=st.booleans(),
    activation=st.sampled_from(["identity", "silu"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_results_and_gradients(
    sizes: tuple[int, int, int, int], short: bool, bias: bool, state: bool, activation: str, dtype: torch.dtype
) -> None:
    batch, tokens, channels, taps = sizes
    tokens = 1 + tokens % taps if short else tokens
    tensors = drawn(batch, tokens, channels, taps, bias=bias, state=state, dtype=dtype)
    grad, grad_after = (torch.randn(batch, n, channels, dtype=dtype) for n in (tokens, taps - 1))
    grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    leaves = [None if t is None else t.detach().requires_grad_() for t in tensors]
    y, after = torch.ops.gatecc.short_convolution(*leaves, activation=activation)
    wanted = [t for t in leaves if t is not None]
    grads = torch.autograd.grad((y, after), wanted, (grad, grad_after))
    assert y.is_contiguous()
    assert after.is_contiguous()
    # A sum over all tokens is as exact as its largest terms are.
    steps = 4e-6 if dtype == torch.float32 else 2**-7
    for found, expected in zip((y, after, *grads), exact(tensors, activation, grad, grad_after), strict=True):
        assert (found.shape, found.dtype) == (expected.shape, dtype)
        assert (found.double() - expected).abs().max() <= steps * (1 + expected.abs().max())


def test_the_kernels_take_these_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that no fallback was compared; the number of threads changes no bit."""
    tensors = [
        t.requires_grad_() for t in drawn(2, 150, 37, 4, bias=True, state=True, dtype=torch.float32) if t is not None
    ]
    calls: list[str] = []
    for name in ("forward", "backward"):
        plain = getattr(CpuKernels, name)

        def spy(*args: Any, name: str = name, plain: Any = plain) -> Any:
            found = plain(*args)
            calls.append(name + " not" * (found is None))
            return found

        monkeypatch.setattr(CpuKernels, name, spy)
    found: list[tuple[Tensor, ...]] = []
    threads = torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            y, _ = short_convolution(*tensors, activation="silu")
            found.append((y, *torch.autograd.grad(y.square().sum(), tensors)))
        finally:
            torch.set_num_threads(threads)
    assert calls == ["forward", "backward"] * 2
    assert all(map(torch.equal, *found))


def test_it_learns_to_any_order_and_maps() -> None:
    torch.manual_seed(0)
    given = [
        t.detach().requires_grad_()
        for t in drawn(2, 3, 2, 4, bias=True, state=True, dtype=torch.float64)
        if t is not None
    ]

    def function(*tensors: Tensor) -> tuple[Tensor, Tensor]:
        return short_convolution(*tensors, activation="silu")

    assert torch.autograd.gradcheck(function, given, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(function, given)
    x, *rest = (t.detach().float() for t in given)
    mapped = torch.func.vmap(lambda one, s: function(one[None], *rest[:2], s[None])[0][0])(x, rest[2])
    assert torch.allclose(mapped, function(x, *rest)[0], atol=1e-5)


def test_what_is_not_asked_for_is_not_computed() -> None:
    x, weight, bias, state = drawn(2, 9, 5, 3, bias=True, state=True, dtype=torch.float32)
    assert x is not None
    whole = [t.detach().requires_grad_() for t in (x, weight, bias, state) if t is not None]
    grads = torch.autograd.grad(short_convolution(*whole)[0].sum(), whole)
    for i, leaf in enumerate(whole):
        others = [t if t is leaf else t.detach() for t in whole]
        assert torch.equal(torch.autograd.grad(short_convolution(*others)[0].sum(), leaf)[0], grads[i])


def test_pieces() -> None:
    x, weight, bias, state = drawn(2, 12, 5, 4, bias=True, state=False, dtype=torch.float32)
    assert x is not None
    assert weight is not None
    whole, last = short_convolution(x, weight, bias, activation="silu")
    found: list[Tensor] = []
    for piece in x.split([1, 2, 0, 7, 2], 1):
        y, state = short_convolution(piece, weight, bias, state, activation="silu")
        found.append(y)
    assert torch.allclose(torch.cat(found, 1), whole, atol=1e-6)
    assert state is not None
    assert torch.equal(state, last)


def test_the_operator_is_one_to_torch() -> None:
    x, weight, _, state = drawn(2, 7, 6, 4, bias=False, state=True, dtype=torch.float32)
    assert x is not None
    given = (x.requires_grad_(), weight, None, state)
    torch.library.opcheck(torch.ops.gatecc.short_convolution.default, given, {"activation": "silu"})
    assert set(KERNELS) >= {"cpu"}


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("activation", {"activation": "relu"}),
        ("channel", {"weight": torch.randn(5, 1, 4)}),
        ("bias", {"bias": torch.randn(5)}),
        ("state", {"state": torch.randn(2, 4, 6)}),
        ("dtype", {"weight": torch.randn(6, 1, 4).double()}),
    ],
)
def test_what_does_not_fit_is_refused(what: str, change: dict[str, object]) -> None:
    given: dict[str, object] = {"x": torch.randn(2, 3, 6), "weight": torch.randn(6, 1, 4), **change}
    with pytest.raises(ArgumentError, match=what):
        torch.ops.gatecc.short_convolution(**given)


class Language(nn.Module):
    """A short convolution between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16)
        self.weight = nn.Parameter(torch.randn(8, 1, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(short_convolution(self.embed(ids), self.weight, activation="silu")[0])


def test_a_decoder_carries_its_state() -> None:
    model, ids = Language().eval(), torch.randint(0, 16, (2, 9))
    decoder = gatecc.decoder(model, (ids,))
    with torch.no_grad():
        expected = model(ids)
        logits, state = decoder.prefill(ids[:, :2])
        assert torch.allclose(logits[:, -1], expected[:, 1], atol=1e-5)
        for t in range(2, 9):
            logits, state = decoder.step(ids[:, t : t + 1], state)
            assert torch.allclose(logits[:, -1], expected[:, t], atol=1e-5)
