"""Weights of other classes: quantised ones stay what they are, in both orders; what has no elements yet is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import gatecc
from gatecc.errors import UnsupportedModelError
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


def test_weights_that_do_not_exist_yet_are_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"0\.weight"):
        gatecc.inspect(nn.Sequential(nn.LazyLinear(4)), (torch.randn(2, 3),))
