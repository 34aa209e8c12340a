"""find_sites on real models: owners as the libraries name them, values as their modules compute them."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gatecc.ir.select import Selector
from tests.ir.match.found import Found, find
from tests.zoo import find as zoo

# The FFN modules as the libraries name them, two layers each. BERT has none: its layer calls two siblings.
MLPS: dict[str, list[str]] = {
    "hf/llama-sdpa": ["model.layers.0.mlp", "model.layers.1.mlp"],
    "hf/gpt2-sdpa": ["transformer.h.0.mlp", "transformer.h.1.mlp"],
    "hf/bert-sdpa": ["encoder.layer.0", "encoder.layer.1"],
    "hf/vit-sdpa": ["layers.0.mlp", "layers.1.mlp"],
    "hf/t5-sdpa": [
        *(f"encoder.block.{i}.layer.1.DenseReluDense" for i in (0, 1)),
        *(f"decoder.block.{i}.layer.2.DenseReluDense" for i in (0, 1)),
    ],
    "hf/mixtral-sdpa": ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"],
    "hf/albert-sdpa": ["encoder.albert_layer_groups.0.albert_layers.0"] * 2,
    "hf/segformer-sdpa": ["stages.0.blocks.0.mlp", "stages.1.blocks.0.mlp"],
    "timm/swin-sdpa": [f"layers.{i}.blocks.{j}.mlp" for i in (0, 1) for j in (0, 1)],
    "timm/convnext": [f"stages.{i}.blocks.0.mlp" for i in range(4)],
}


@cache
def found_in(name: str) -> Found:
    case = zoo(name).build()
    return find(case.model, *case.args, **case.kwargs)


@pytest.mark.parametrize("name", MLPS)
def test_mlp_owners(name: str) -> None:
    found = found_in(name)
    assert found.owners("mlp") == MLPS[name]
    assert not found.refusals("mlp")


@pytest.mark.parametrize("name", MLPS)
def test_values_are_what_the_modules_compute(name: str) -> None:
    """Every Linear, Conv, Embedding, MLP and Block reads and yields what its owner does."""
    found = found_in(name)
    case = zoo(name).build()
    sites = [
        s
        for s in found.all.found
        if s.kind in ("linear", "conv", "embedding", "mlp", "block") and s.owner and not s.call
    ]
    seen = _record(case.model, {site.owner for site in sites}, lambda: case.model(*case.args, **case.kwargs))
    compared = 0
    for site in sites:
        given, out = seen.get(site.owner, (None, None))
        if given is None or out is None or given.shape != found.value(site, "in").shape:
            continue  # BERT's layer is more than its MLP
        if site.kind == "mlp" and site.owner.rpartition(".")[2].isdigit():
            continue
        torch.testing.assert_close(found.value(site, "in"), given, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.value(site, "out"), out, rtol=1e-4, atol=1e-5)
        compared += 1
    assert compared >= 0.8 * len(sites)


def _record(
    model: nn.Module, owners: set[str], run: Callable[[], Any]
) -> dict[str, tuple[Tensor | None, Tensor | None]]:
    """The first input and output of the first call of each module."""
    seen: dict[str, tuple[Tensor | None, Tensor | None]] = {}

    def hook(owner: str) -> Callable[..., None]:
        def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
            given = next((a for a in (*args, *kwargs.values()) if isinstance(a, Tensor)), None)
            first = out if isinstance(out, Tensor) else next(iter(out), None)
            result = first.detach().clone() if isinstance(first, Tensor) else None
            seen.setdefault(owner, (None if given is None else given.detach().clone(), result))

        return record

    handles = [model.get_submodule(o).register_forward_hook(hook(o), with_kwargs=True) for o in owners]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("name", MLPS)
def test_weights_reproduce_the_products(name: str) -> None:
    found = found_in(name)
    for site in found.sites("linear"):
        weight = site.weights["weight"]
        out = found.value(site, "in") @ found.matrix(site, "weight").mT
        if weight.bias is not None:
            out = out + found.parameter(weight.bias).detach()
        torch.testing.assert_close(found.value(site, "out"), out, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MLPS)
def test_every_site_is_well_formed(name: str) -> None:
    found = found_in(name)
    keys = [(site.kind, site.key) for site in found.all.found]
    assert len(keys) == len(set(keys))
    for site in found.all.found:
        assert site.line
        for name in site.values:
            Selector(site.kind, ..., name)  # every value can be selected
        for value in site.values.values():
            assert len(value.axes) == len(value.node.meta["val"].shape), (site.key, value.axes)
            assert len(set(value.axes)) == len(value.axes)
        for weight in site.weights.values():
            assert isinstance(found.parameter(weight.fqn), nn.Parameter)
    for refusal in found.all.refusals:
        assert refusal.line
        assert refusal.reason
        assert refusal.remedy


@pytest.mark.parametrize("name", MLPS)
def test_residuals_are_where_the_blocks_are(name: str) -> None:
    """Two joins a layer, three in a decoder with cross-attention, one in ConvNeXt, and each adds up."""
    found = found_in(name)
    expected = {"hf/t5-sdpa": 10, "timm/swin-sdpa": 8}.get(name, 4)
    sites = found.sites("residual")
    assert len(sites) == expected
    for site in sites:
        total = found.value(site, "skip") + found.value(site, "branch")
        torch.testing.assert_close(total, found.value(site, "out"))
    assert not found.sites("merge")
