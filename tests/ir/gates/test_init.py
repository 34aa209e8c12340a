"""Inits."""

from __future__ import annotations

import pytest
import torch

from gatecc.ir.gate import GateModule, GateShape, GateSpec, SourceShape

C, F = 400, 50


def gate(init: str, scorer: str = "linear") -> GateModule:
    spec = GateSpec("hidden", scorer, "channel", "sigmoid", init=init)
    return spec.build(GateShape("bnc", {"c": F}, (SourceShape("bnc", C),)))


def test_zero() -> None:
    assert not any(p.any() for p in gate("zero").parameters())


def test_random_and_uniform() -> None:
    drawn = gate("random(std=0.3, bias=1.5)")
    assert float(drawn.get_parameter("weight").detach().std()) == pytest.approx(0.3, rel=0.05)
    assert (drawn.get_parameter("bias") == 1.5).all()
    uniform = gate("uniform")
    assert 0.04 < uniform.get_parameter("weight").abs().max() <= C**-0.5
    assert gate("uniform(bound=2)").get_parameter("weight").abs().max() > 1.9


def test_inner_weights_are_never_zero() -> None:
    """Or no gradient would ever pass an mlp whose last layer starts at zero."""
    inner = gate("identity", "mlp(8)")
    assert inner.get_parameter("hidden_weight").any()
    assert not inner.get_parameter("weight").any()


def test_fold_leaves_a_plain_sigmoid() -> None:
    spec = GateSpec("hidden", init="identity(how=fold)")
    g = spec.build(GateShape("bnc", {"c": F}, (SourceShape("bnc", C),)))
    out = g(torch.randn(1, 2, F), torch.randn(1, 2, C))
    assert spec.fold_factor == 2.0
    assert (out == 0.5).all()
