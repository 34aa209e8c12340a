"""The fuse rewrite; the golden cases in tests/golden/fuse show it."""

from __future__ import annotations

import pytest
import torch

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.passes.fuse import Fuse
from tests.graphs import MLP, done

JOIN = Selector.parse("residual[...].out")


def _fuse(init: str = "zero", scale: float = 1.0) -> Fuse:
    return Fuse(JOIN, GateSpec("skip", "linear", "channel", "sigmoid", init=init), scale=scale)


@pytest.mark.parametrize("scale", [1.0, 2.0])
def test_a_gate_chooses_between_the_two(scale: float) -> None:
    result = done(MLP, _fuse("random(std=1)", scale))
    x, down = result.values["x"], result.values["down"]
    gate = result.program.module.get_submodule("gate")
    g = torch.sigmoid(x @ gate.get_parameter("weight").T + gate.get_parameter("bias"))
    assert torch.allclose(result.run()[0], scale * (g * x + (1 - g) * down), atol=1e-5)


@pytest.mark.parametrize("bias", [-40.0, 40.0])
def test_a_large_bias_picks_one(bias: float) -> None:
    result = done(MLP, _fuse())
    with torch.no_grad():
        result.program.module.get_submodule("gate").get_parameter("bias").fill_(bias)
    assert torch.allclose(result.run()[0], result.values["x" if bias > 0 else "down"], atol=1e-6)


def test_the_doubled_average_is_the_sum() -> None:
    assert done(MLP, _fuse(scale=2.0)).error <= 1e-6
    assert str(_fuse(scale=2.0).contract()) == "identity_at_init(1e-06)"
    assert str(_fuse().contract()) == str(_fuse("random(std=1)", 2.0).contract()) == "changes_function"


def test_an_add_in_place_into_a_value_that_others_read_is_refused() -> None:
    text = MLP.replace("add.Tensor(%x, %down)", "add_.Tensor(%down, %x)").replace(
        "return %sum", "%late = relu(%down)  # b n 8\n    return %sum, %late"
    )
    with pytest.raises(SiteRefusedError, match="in place"):
        done(text, _fuse())


def test_several_values_are_needed() -> None:
    with pytest.raises(ArgumentError, match="several values"):
        Fuse(JOIN, GateSpec("skip", "linear", "channel", "sigmoid"), values=("skip",))
