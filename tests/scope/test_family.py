"""Sharing: when two outputs count as equal."""

from __future__ import annotations

import torch

from gatecc.scope.family import difference, same_outputs


def test_outputs_are_compared_at_their_own_scale() -> None:
    """Layers that start at almost nothing must not share a graph because everything is small."""
    tiny = torch.tensor([1e-6, -2e-6])
    assert not same_outputs(tiny, -tiny, 1e-5)
    assert same_outputs(tiny, tiny * (1 + 1e-6), 1e-5)
    assert difference(tiny, -tiny) < 1e-5, "contracts are measured against outputs of size one"
