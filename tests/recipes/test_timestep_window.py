"""Channel windows by timestep."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.errors import SiteRefusedError
from tests.recipes.checks import agree, new_parameters, reverted
from tests.recipes.tiny import WIDTH, reference, tiny

X = torch.randn(3, 6, 16, generator=torch.Generator().manual_seed(7))
T = torch.tensor([0, 500, 999])


def _window(t: float, beta: float, alpha: float, steps: int) -> Tensor:
    """The paper's mask, counted out."""
    inside = int(beta * WIDTH)
    start = round((t / steps) ** alpha * (WIDTH - inside))
    return torch.tensor([1.0 if start <= i < start + inside else 0.0 for i in range(WIDTH)])


def test_windows_are_the_papers() -> None:
    plain = tiny()
    model = gatecc.transform(plain, gatecc.recipe("timestep-windows", beta=0.5, steps=1000), (X, T), verify=False)
    assert not new_parameters(model, plain)
    for times in (T, torch.tensor([10, 20, 900])):
        masks = torch.stack([_window(float(t), 0.5, 4.0, 1000) for t in times])[:, None]

        kept: list[Tensor] = []

        def at(
            place: str, layer: int, value: Tensor, masks: Tensor = masks, kept: list[Tensor] = kept, **seen: Tensor
        ) -> Tensor:
            if place == "before":
                kept.append(value * (1 - masks))
                return value * masks
            return value + kept.pop() if place == "after" else value

        assert agree(model, reference(plain, at), X, times) <= 1e-6 < agree(model, plain, X, times)
    reverted(model, plain, (X, T))


def test_a_whole_window_is_the_original_bitwise() -> None:
    plain = tiny()
    recipe = gatecc.recipe("timestep-windows", beta=1.0)
    model = gatecc.transform(plain, recipe, (X, T), verify=False)
    assert agree(model, plain, X, T) == 0
    assert str(recipe.rewrites[0].contract()) == "exact"


def test_near_timesteps_share_more_channels_than_far_ones() -> None:
    model: Any = gatecc.transform(
        tiny(layers=2), gatecc.recipe("timestep-windows", beta=0.4, alpha=1.0), (X, T), verify=False
    )
    gate = next(m for m in model.modules() if type(m).__name__ == "GateModule")
    masks = gate(torch.zeros(11, 1, WIDTH), torch.arange(0, 1001, 100)).squeeze(1)
    assert torch.equal(masks.sum(-1), torch.full((11,), float(int(0.4 * WIDTH))))
    shared = masks @ masks.T
    assert all(shared[i, i + 1] >= shared[i, j] for i in range(10) for j in range(i + 1, 11))


def test_exports_with_the_timestep() -> None:
    model = gatecc.transform(tiny(), gatecc.recipe("timestep-windows", beta=0.5), (X, T), verify=False)
    with torch.no_grad():
        program = torch.export.export(model, (X, T), strict=False)
        assert torch.allclose(program.module()(X, T + 7), model(X, T + 7), atol=1e-6)


def test_a_model_without_that_input_is_refused() -> None:
    with pytest.raises(SiteRefusedError, match="no input 'sigma'") as error:
        gatecc.transform(tiny(), gatecc.recipe("timestep-windows", timestep="sigma"), (X, T))
    assert "x, timestep" in str(error.value)
