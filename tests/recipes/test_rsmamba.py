"""RSMamba: three scans of a mixer, weighed by their means, on models of libraries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from tests.recipes.checks import randomise
from tests.recipes.replaced import gap


def _scanned(run: Any, x: Tensor, weight: Tensor) -> Tensor:
    """sum_i w_i P_i^-1 f(P_i x) for the plain order, the flip, and a shuffle that is sorted by hashes."""
    n = x.size(1)
    mixed = [((i + 1) * 48271) % 2147483647 for i in range(n)]
    mixed = [(m * m + i + 1) % 2147483647 for i, m in enumerate(mixed)]
    shuffle = torch.tensor(sorted(range(n), key=mixed.__getitem__))
    assert sorted(shuffle.tolist()) == list(range(n)) != shuffle.tolist()
    back = torch.empty_like(shuffle)
    back[shuffle] = torch.arange(n)
    each = [run(x), run(x.flip(1)).flip(1), run(x[:, shuffle])[:, back]]
    w = (torch.cat([y.mean(1) for y in each], -1) @ weight.T).softmax(-1)
    return sum(w[:, i, None, None] * y for i, y in enumerate(each))  # pyright: ignore[reportReturnType]


def test_three_scans_of_a_mamba_are_weighed_by_their_means() -> None:
    hf: Any = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = hf.MambaConfig(vocab_size=33, hidden_size=12, state_size=4, num_hidden_layers=2, use_cache=False)
    plain = hf.MambaModel(config).eval()
    randomise(plain.parameters(), 0.3)
    ids = torch.randint(0, 33, (2, 6))
    model: Any = gatecc.transform(plain, gatecc.recipe("rsmamba", sites="block[...].out"), {"input_ids": ids})
    weights = [layer.scan_gate.weight for layer in model.layers]
    with torch.no_grad():
        for _ in range(2):  # the plain mean, then other weights
            x = plain.embeddings(ids)
            for layer, weight in zip(plain.layers, weights, strict=True):
                x = _scanned(layer, x, weight)
            assert gap(plain.norm_f(x), model(input_ids=ids)) <= 1e-4
            randomise(weights, 1.0)


def test_three_scans_of_a_patch_mixer() -> None:
    timm: Any = pytest.importorskip("timm.models.mlp_mixer")
    torch.manual_seed(0)
    plain: Any = timm.MlpMixer(num_classes=3, img_size=16, patch_size=4, num_blocks=1, embed_dim=12).eval()
    randomise(plain.parameters(), 0.3)
    x = torch.randn(2, 3, 16, 16)
    model: Any = gatecc.transform(plain, gatecc.recipe("rsmamba", sites="residual[0]"), (x,))
    weight = model.blocks[0].scan_gate.weight
    randomise([weight], 1.0)
    block = plain.blocks[0]
    mixer = lambda y: block.mlp_tokens(block.norm1(y).transpose(1, 2)).transpose(1, 2)  # noqa: E731
    with torch.no_grad():
        y = plain.stem(x)
        y = y + _scanned(mixer, y, weight)
        y = y + block.mlp_channels(block.norm2(y))
        expected = plain.head(plain.norm(y).mean(1))
        assert gap(expected, model(x)) <= 1e-5
