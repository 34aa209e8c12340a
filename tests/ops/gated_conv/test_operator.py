"""``gatecc::gated_conv`` against torch's convolution times the gate."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gatecc.capture.flops import counted
from gatecc.errors import ArgumentError
from gatecc.ops.gated_conv import gated_conv, kernels

PLAIN: dict[str, Any] = {"stride": [1, 1], "padding": [1, 1], "dilation": [1, 1]}


def _masks(on: list[list[bool]], axes: int) -> Tensor:
    return torch.tensor(on, dtype=torch.float32).view(len(on), -1, *[1] * axes)


def _given(samples: int = 3, channels: int = 8, out: int = 6, seed: int = 0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    x, weight = torch.randn(samples, channels, 9, 9, generator=g), torch.randn(out, channels, 3, 3, generator=g)
    return x, weight, (torch.rand(samples, out, 1, 1, generator=g) > 0.5).float(), torch.randn(out, generator=g)


@pytest.mark.parametrize("in_c", [True, False])
@given(data=st.data())
def test_any_convolution_with_any_masks(in_c: bool, data: st.DataObject) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "get_num_threads", lambda: 1)
        if not in_c:
            patch.setattr(kernels, "KERNELS", {})
        _any_convolution(data)


def _any_convolution(data: st.DataObject) -> None:
    axes = data.draw(st.integers(1, 3))
    form = data.draw(st.sampled_from(["plain", "depthwise", "transposed"]))
    samples, channels, per = (data.draw(st.integers(1, n)) for n in (4, 4, 3))
    out = channels * per if form == "depthwise" else data.draw(st.integers(1, 5))
    kernel, stride, dilation = (data.draw(st.lists(st.integers(1, 2), min_size=axes, max_size=axes)) for _ in range(3))
    padding = data.draw(st.lists(st.integers(0, 1), min_size=axes, max_size=axes))
    bits = st.lists(st.booleans(), min_size=out, max_size=out)
    rows = data.draw(st.sampled_from([1, samples]))
    gate = _masks([data.draw(bits) for _ in range(rows)], axes) * data.draw(st.sampled_from([1.0, -0.5]))
    inputs = _masks(
        [data.draw(st.lists(st.booleans(), min_size=channels, max_size=channels)) for _ in range(samples)], axes
    )
    torch.manual_seed(0)
    x = torch.randn(samples, channels, *[5] * axes) * inputs
    groups = channels if form == "depthwise" else 1
    sizes = (channels, out) if form == "transposed" else (out, channels // groups)
    weight, bias = torch.randn(*sizes, *kernel), data.draw(st.sampled_from([None, torch.randn(out)]))
    options: dict[str, Any] = {"stride": stride, "padding": padding, "dilation": dilation, "groups": groups}
    function: Any = getattr(F, f"conv_transpose{axes}d" if form == "transposed" else f"conv{axes}d")
    expected = function(x, weight, bias, **options) * gate
    known = data.draw(st.sampled_from([None, inputs]))
    y = gated_conv(x, weight, gate, bias, known, **options, transposed=form == "transposed")
    assert y.shape == expected.shape
    assert y.is_contiguous()
    assert torch.allclose(y, expected, atol=1e-5)
    assert bool((y[(gate == 0).expand(samples, out, *[1] * axes).expand_as(y)] == 0).all())


def test_all_channels_on_is_the_convolution_bitwise() -> None:
    x, weight, gate, bias = _given()
    assert torch.equal(
        gated_conv(x, weight, torch.ones_like(gate), bias, **PLAIN), F.conv2d(x, weight, bias, padding=1)
    )


def test_what_is_off_is_not_counted_and_what_samples_share_is_run_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    x, weight, _, bias = _given(2)
    pair = 2 * 9 * 81  # operations of a pair of channels in one sample
    one = _masks([[True, True, False, False, False, False]], 2)
    read = _masks([[True] * 4 + [False] * 4], 2)
    assert counted(lambda: gated_conv(x[:1] * read, weight, one, bias, read, **PLAIN))[1] == 2 * 4 * pair
    assert counted(lambda: gated_conv(x, weight, one, bias, **PLAIN))[1] == 2 * 2 * 8 * pair
    apart = _masks([[True] * 3 + [False] * 3, [False] * 3 + [True] * 3], 2)
    assert counted(lambda: gated_conv(x, weight, apart, bias, **PLAIN))[1] == 2 * 3 * 8 * pair, "a kernel: apart"
    monkeypatch.setattr(kernels, "KERNELS", {})
    assert counted(lambda: gated_conv(x, weight, apart, bias, **PLAIN))[1] == 2 * 6 * 8 * pair, "small: one call"
    wide = torch.randn(2, 64, 32, 32), torch.randn(64, 64, 3, 3)
    apart = torch.eye(2).repeat_interleave(32, 1)[:, :, None, None]
    y, ran = counted(lambda: gated_conv(*wide, apart, **PLAIN))
    assert ran == 2 * 32 * 64 * 2 * 9 * 32 * 32, "large: each sample its own channels"
    assert torch.allclose(y, F.conv2d(*wide, padding=1) * apart, atol=1e-4)


def test_gradients_are_those_of_the_formula_also_for_what_is_off() -> None:
    leaves = [t.double().requires_grad_() for t in _given(2)]
    x, weight, gate, bias = leaves
    assert torch.autograd.gradcheck(lambda x, w, g, b: gated_conv(x, w, g, b, **PLAIN), leaves, fast_mode=True)
    wanted = torch.autograd.grad((F.conv2d(x, weight, bias, padding=1) * gate).sin().sum(), leaves)
    found = torch.autograd.grad(gated_conv(x, weight, gate, bias, **PLAIN).sin().sum(), leaves)
    assert all(map(torch.equal, wanted, found))
    assert bool((found[2][gate == 0] != 0).any()), "a gate that is off learns from what it hides"


def test_modes_of_torch() -> None:
    x, weight, gate, bias = _given()
    expected = F.conv2d(x, weight, bias, padding=1) * gate
    each = torch.func.vmap(lambda a, g: gated_conv(a[None], weight, g[None], bias, **PLAIN)[0])
    assert torch.allclose(each(x, gate), expected, atol=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        half = gated_conv(x, weight, gate, bias, **PLAIN)
    assert half.dtype == torch.bfloat16
    assert torch.allclose(half.float(), expected, atol=0.2)

    def function(x: Tensor, weight: Tensor, gate: Tensor, bias: Tensor) -> Tensor:
        return gated_conv(x, weight, gate, bias, **PLAIN).relu()

    compiled: Any = torch.compile(function, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x, weight, gate, bias), expected.relu(), atol=1e-5)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"groups": 2}, "cannot be left out one by one"), ({"gate": torch.ones(3, 5, 1, 1)}, "per sample and channel")],
)
def test_what_does_not_fit(options: dict[str, Any], words: str) -> None:
    x, weight, gate, bias = _given()
    if "groups" in options:
        weight = weight[:, :4]
    with pytest.raises(ArgumentError, match=words):
        gated_conv(x, weight, options.pop("gate", gate), bias, **PLAIN, **options)
