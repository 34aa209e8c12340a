"""Weights of other classes: quantised ones stay what they are, in both orders; what has no elements yet is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import CheckpointError, SiteRefusedError, UnsupportedModelError
from tests.scope.test_adapters import X, net

quantization: Any = pytest.importorskip("torchao.quantization", reason="quantised weights are torchao's")


def quantised(model: Any) -> Any:
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), lambda m, name: "_proj" in name)
    return model


def test_gates_on_a_quantised_model_and_quantising_a_gated_one() -> None:
    base = quantised(net())
    kind = type(base.attention.q_proj.weight)
    gated: Any = gatecc.transform(copy.deepcopy(base), "gated-attention", (X,))
    assert type(gated.attention.q_proj.weight) is kind
    assert gated.attention.gate.weight.dtype is torch.float32
    assert torch.allclose(gated(X), base(X), atol=1e-6)
    later = quantised(gatecc.transform(net(), "gated-attention", (X,)))
    assert torch.allclose(later(X), base(X), atol=1e-6)


def test_only_what_is_new_of_a_quantised_model_is_saved(tmp_path: Path) -> None:
    base = quantised(net())
    gated: Any = gatecc.transform(copy.deepcopy(base), "gated-attention", (X,))
    with torch.no_grad():
        gated.attention.gate.weight.normal_()
    with pytest.raises(CheckpointError, match=r"(?s)q_proj\.weight.*Int8Tensor.*only_new=True"):
        gatecc.save(gated, tmp_path)
    gatecc.save(gated, tmp_path, only_new=True)
    assert torch.equal(gatecc.load(base, tmp_path)(X), gated(X))
    other = net()
    other.attention.q_proj.weight.data *= 1.1
    with pytest.raises(CheckpointError, match=r"other weights.*\n? *"):
        gatecc.load(quantised(other), tmp_path)


def test_rewrites_that_change_a_weight_refuse_a_quantised_one() -> None:
    fused = gatecc.recipe("gated-attention", fuse_into="q", init="zero")
    with pytest.raises(SiteRefusedError, match=r"(?s)q_proj\.weight cannot take rows.*Int8Tensor"):
        gatecc.transform(quantised(net()), fused, (X,))
    gated = gatecc.transform(net(), fused, (X,))
    expected = gated(X)
    quantised(gated)
    assert torch.allclose(gated(X), expected, atol=1e-2)
    with pytest.raises(UnsupportedModelError, match=r"(?s)q_proj\.weight.*Int8Tensor.*quantise last"):
        gatecc.revert(gated)
    packed: Any = torch.ao.quantization.quantize_dynamic(  # pyright: ignore[reportDeprecated]
        gatecc.transform(net(), fused, (X,)), {nn.Linear}
    )
    with pytest.raises(UnsupportedModelError, match=r"(?s)q_proj\.(weight|bias).*Linear without this parameter"):
        packed(X)


def test_weights_that_do_not_exist_yet_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        gatecc.inspect(nn.Sequential(nn.LazyLinear(4)), (torch.randn(2, 3),))
