"""The bypass rewrite; the golden case in tests/golden/bypass shows it."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.passes.bypass import Bypass
from tests.graphs import MLP, Done, done

SITE = Selector.parse("mlp[...].out")


def _expected(result: Done, g: torch.Tensor) -> torch.Tensor:
    x, module = result.values["x"], result.program.module
    up, down = module.get_parameter("mlp.up.weight"), module.get_parameter("mlp.down.weight")
    return x + F.gelu((g * x) @ up.T) @ down.T + (1 - g) * x


def test_the_rest_goes_around() -> None:
    result = done(MLP, Bypass(SITE, GateSpec("self", "linear", "channel", "sigmoid", init="random(std=1)")))
    gate = result.program.module.get_submodule("mlp.gate")
    g = torch.sigmoid(result.values["x"] @ gate.get_parameter("weight").T + gate.get_parameter("bias"))
    assert torch.allclose(result.run()[0], _expected(result, g), atol=1e-5)


def test_a_window_is_cut_out_and_a_whole_window_is_exact() -> None:
    text = MLP.replace("%mask = input  # b n bool", "%t = input  # b")
    window = "schedule(beta={}, alpha=1, steps=10)"
    half = done(text, Bypass(SITE, GateSpec("cond(t)", window.format(0.5), "channel", "linear")))
    half.program.example[1] = torch.tensor([0.0, 10.0])
    g = torch.zeros(2, 1, 8)
    g[0, :, :4] = g[1, :, 4:] = 1
    assert torch.allclose(half.run()[0], _expected(half, g), atol=1e-5)
    whole = Bypass(SITE, GateSpec("cond(t)", window.format(1), "channel", "linear"))
    assert done(text, whole).error == 0
    assert str(whole.contract()) == "exact"
