"""Context gates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, SiteRefusedError
from tests.recipes.checks import agree, new_parameters, randomise, reverted, zoo


class Streams(nn.Module):
    """Two streams of two layers each, x: (B, N, 8), c: (B, M, 6); ``gates`` multiply the second activations by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.audio = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(2))
        self.vision = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.gates: Any = None

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        for i, (a, v) in enumerate(zip(self.audio, self.vision, strict=True)):
            c, x = a(c), v(x)
            x = x if self.gates is None else x * self.gates(i, c)
        return x, c


def _inputs(n: int, m: int) -> tuple[Tensor, Tensor]:
    return torch.randn(2, n, 8), torch.randn(2, m, 6)


@pytest.mark.parametrize("pool", [False, True])
def test_each_layer_reads_the_context_of_its_own_depth(pool: bool) -> None:
    plain = Streams().eval()
    inputs = _inputs(5, 7 if pool else 5)
    options: dict[str, Any] = dict(context="activation[audio.*].out", sites="activation[vision.*]", pool=pool)
    model: Any = gatecc.transform(plain, gatecc.recipe("context-gates", **options), inputs, verify=False)
    assert agree(model, plain, *inputs) == 0
    randomise(new_parameters(model, plain).values())
    reference = Streams()
    reference.load_state_dict(plain.state_dict())
    found = [m for m in model.modules() if type(m).__name__ == "GateModule"]
    assert len(found) == 2

    def by_hand(layer: int, c: Tensor) -> Tensor:
        c = c.mean(1, keepdim=True) if pool else c
        return 1 + torch.tanh(c @ found[layer].weight.T + found[layer].bias)

    reference.gates = by_hand
    other = (inputs[0][:, :4], inputs[1] if pool else inputs[1][:, :4])
    assert agree(model, reference, *inputs) <= 1e-6
    assert agree(model, reference, *other) <= 1e-6
    reverted(model, plain, inputs)


def test_no_context_is_the_original() -> None:
    plain = Streams().eval()
    x, c = _inputs(5, 5)
    for stream in plain.audio:
        nn.init.zeros_(stream.get_parameter("0.bias"))
    model = gatecc.transform(
        plain,
        gatecc.recipe("context-gates", context="activation[audio.1.1]", sites="activation[vision.1.1]"),
        (x, c),
        verify=False,
    )
    randomise(p for name, p in new_parameters(model, plain).items() if name.endswith("weight"))
    assert agree(model, plain, x, c) > 1e-3
    assert agree(model, plain, x, torch.zeros_like(c)) == 0


def test_a_context_must_be_given_and_must_pair_up() -> None:
    with pytest.raises(ArgumentError, match="needs the option context"):
        gatecc.recipe("context-gates")
    recipe = gatecc.recipe("context-gates", context="activation[audio.*]", sites="activation[vision.0.1]")
    with pytest.raises(SiteRefusedError, match="is no source for each") as error:
        gatecc.transform(Streams().eval(), recipe, _inputs(5, 5))
    assert "2 sources, 1 sites" in str(error.value)


def test_a_context_that_is_computed_later_is_refused() -> None:
    recipe = gatecc.recipe("context-gates", context="activation[vision.1.1]", sites="activation[vision.0.1]")
    with pytest.raises(gatecc.GateccError, match="depends on the one it replaces"):
        gatecc.transform(Streams().eval(), recipe, _inputs(5, 5))


@pytest.mark.broad(2)
@pytest.mark.parametrize(
    ("name", "options", "export"),
    [
        ("hf/bert-sdpa", {"context": "activation[0].out", "sites": "activation[1]"}, True),
        (
            "hf/t5-eager",
            {"context": "block[encoder.block.1].out", "sites": "activation[decoder.*]", "pool": True},
            False,
        ),
    ],
)
def test_real_models(name: str, options: dict[str, Any], export: bool) -> None:
    zoo(name, "context-gates", export=export, **options)
