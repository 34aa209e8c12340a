"""short-convolutions: causal ones of few taps are one operator with the same numbers; others stay, with a reason."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc import backend
from gatecc.ops.short_convolution.c.kernels import CpuKernels
from gatecc.passes.lower import Outcome
from tests.decoder.mixing import Convolution, D


def lowered(function: Any, *args: Any, dynamic: bool | None = None) -> tuple[list[Outcome], list[Any]]:
    """The outcomes, and the activations of the operators, of a graph that computes the same as the function."""
    outcomes: list[Outcome] = []
    activations: list[Any] = []

    def spy(graph_module: Any, example: Any) -> Any:
        found = backend.lower(graph_module, example)
        outcomes.extend(o for o in found.outcomes if o.lowering == "short-convolutions")
        operator = torch.ops.gatecc.short_convolution.default
        activations.extend(
            n.kwargs.get("activation", "identity") for n in found.graph.graph.nodes if n.target is operator
        )
        return found.graph.forward

    torch._dynamo.reset()
    found = torch.compile(function, backend=spy, fullgraph=True, dynamic=dynamic)(*args)
    expected = function(*args)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-5)
    return outcomes, activations


class Layer(nn.Module):
    """Another convolution than that of tests.decoder.mixing."""

    def __init__(self, function: Callable[[Tensor, nn.Conv1d], Tensor], taps: int = 3, **options: Any) -> None:
        super().__init__()
        self.function = function
        given: dict[str, Any] = {"padding": taps - 1, "groups": D, **options}
        self.conv = nn.Conv1d(D, D, taps, **given)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.conv)


def cut(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return conv(x.transpose(1, 2))[..., : x.size(1)].transpose(1, 2)


def viewed(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """As it lies with channels first."""
    return conv(F.pad(x.transpose(1, 2), (conv.kernel_size[0] - 1, 0))).view(x.size(0), -1)


def in_place(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return F.silu(conv(x.transpose(1, 2))[..., : x.size(1)].mul_(2.0))


def channels_first(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return conv(x.transpose(1, 2).contiguous())[..., : x.size(1)]


def with_state(x: Tensor, conv: nn.Conv1d) -> Tensor:
    return conv(torch.cat([x[:, :2].transpose(1, 2), x.transpose(1, 2)], 2))


def with_states(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """As decoders write it: what the next call starts from is read, too."""
    joined = torch.cat([x[:, :2].transpose(1, 2), x.transpose(1, 2)], 2)
    return F.silu(conv(joined)).transpose(1, 2) + joined[..., -2:].sum(2, keepdim=True).transpose(1, 2)


def read_before(x: Tensor, conv: nn.Conv1d) -> Tensor:
    joined = torch.cat([x[:, :2].transpose(1, 2), x.transpose(1, 2)], 2)
    scale = joined[..., -2:].mean(2, keepdim=True)
    return F.silu(conv(joined)) * scale + joined[..., -2:].sum(2, keepdim=True)


def stacked(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """One reads what the other made, which was put into the graph since."""
    return conv(F.pad(F.silu(conv(F.pad(x.transpose(1, 2), (2, 0)))), (2, 0))).transpose(1, 2)


LOWERED: dict[str, tuple[nn.Module, str]] = {
    "padded on both sides": (Convolution(cut=True), "silu"),
    "padded on the left": (Convolution(cut=False), "silu"),
    "without a bias": (Layer(cut, bias=False), "identity"),
    "viewed": (Layer(viewed, padding=0), "identity"),
    "with a state": (Layer(with_state, padding=0), "identity"),
    "with states": (Layer(with_states, padding=0), "silu"),
    "with a state that is read before": (Layer(read_before, padding=0), "silu"),
}
LEFT: dict[str, tuple[nn.Module, str]] = {
    "in place": (Layer(in_place), "written to"),
    "channels first": (Layer(channels_first), "do not lie together"),
    "wide": (Layer(cut, taps=9), "taps"),
}
NONE = {"dilated": Convolution(cut=True, dilation=2), "mixing": Layer(cut, groups=1)}


@torch.no_grad()
def test_one_behind_another() -> None:
    outcomes, activations = lowered(Layer(stacked, padding=0), torch.randn(2, 11, D))
    assert [o.became for o in outcomes] == ["gatecc::short_convolution"] * 2
    assert activations == ["silu", "identity"]


@pytest.mark.parametrize("name", LOWERED)
@torch.no_grad()
def test_what_looks_back(name: str) -> None:
    layer, activation = LOWERED[name]
    for tokens in (2, 21):  # fewer than taps, and more
        outcomes, activations = lowered(layer, torch.randn(3, tokens, D), dynamic=False)
        assert [o.became for o in outcomes] == ["gatecc::short_convolution"], outcomes
        assert activations == [activation]


@torch.no_grad()
def test_free_sizes() -> None:
    outcomes, _ = lowered(LOWERED["padded on both sides"][0], torch.randn(2, 21, D), dynamic=True)
    assert [o.became for o in outcomes] == ["gatecc::short_convolution"]


@pytest.mark.parametrize("name", LEFT)
@torch.no_grad()
def test_what_stays_says_why(name: str) -> None:
    layer, reason = LEFT[name]
    (outcome,), activations = lowered(layer, torch.randn(3, 21, D))
    assert reason in outcome.reason
    assert not outcome.became
    assert not activations


def test_others() -> None:
    x = torch.randn(3, 21, D)
    with torch.no_grad():
        assert not any(lowered(layer, x)[0] for layer in NONE.values())
        (outcome,), _ = lowered(LOWERED["without a bias"][0].double(), x.double())
    assert "float64" in outcome.reason


@pytest.mark.parametrize("name", ["padded on both sides", "with states"])
def test_it_learns(name: str) -> None:
    layer, x = LOWERED[name][0], torch.randn(3, 21, D, requires_grad=True)

    def gradients(function: Any) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(x).square().sum(), [x, *layer.parameters()])

    torch._dynamo.reset()
    expected = gradients(layer)
    with patch.object(CpuKernels, "backward", autospec=True, side_effect=CpuKernels.backward) as kernel:
        found = gradients(torch.compile(layer, backend="gatecc", fullgraph=True, mode="aot_eager"))
    assert kernel.call_count == 1
    for one, other in zip(found, expected, strict=True):
        assert torch.allclose(one, other, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lfm2() -> None:
    pytest.importorskip("transformers")
    from transformers import Lfm2Config
    from transformers.models.lfm2.modeling_lfm2 import Lfm2ShortConv

    layer = Lfm2ShortConv(Lfm2Config(hidden_size=D, num_attention_heads=2, num_key_value_heads=1), 0)
    outcomes, _ = lowered(layer.eval(), torch.randn(2, 9, D))
    assert [o.became for o in outcomes] == ["gatecc::short_convolution"], outcomes
