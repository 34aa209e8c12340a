"""Conv sites."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from tests.ir.match.found import Lambda, find


@pytest.mark.parametrize(
    ("conv", "shape", "axes"),
    [
        (nn.Conv1d(4, 6, 3, padding="same"), (2, 4, 8), "bcn"),
        (nn.Conv2d(4, 6, 3, stride=2, groups=2), (2, 4, 8, 9), "bcyx"),
        (nn.Conv3d(4, 6, 1), (2, 4, 3, 8, 9), "bctyx"),
        (nn.ConvTranspose1d(4, 6, 3), (2, 4, 8), "bcn"),
        (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 8, 9), "bcyx"),
    ],
)
def test_convolutions(conv: nn.Module, shape: tuple[int, ...], axes: str) -> None:
    x = torch.randn(shape)
    found = find(Lambda(lambda m, x: m.stem(x), stem=conv), x)
    (site,) = found.sites("conv")
    assert (site.key, site.weights["weight"].fqn, site.weights["weight"].bias) == ("stem#0", "stem.weight", "stem.bias")
    assert (site.weights["weight"].orientation, site.values["out"].axes) == ("conv", axes)
    torch.testing.assert_close(found.value(site, "out"), conv(found.value(site, "in")))


def test_a_computed_kernel_is_refused() -> None:
    found = find(
        Lambda(lambda m, x: m.stem(x), stem=parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), torch.randn(2, 3, 8, 8)
    )
    assert found.codes("conv") == ["GCC130"]
    assert not found.sites("conv")
