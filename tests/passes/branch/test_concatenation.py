"""Branches that are concatenated to a value, whose readers get columns."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

import gatecc
from gatecc.errors import SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.ir.site import Site, Value
from gatecc.passes.branch.body import Body
from gatecc.passes.branch.bottleneck import Bottleneck
from gatecc.passes.branch.branch import Branch
from gatecc.recipes import samples
from tests.graphs import MLP, done
from tests.recipes.checks import gradients, new_parameters, randomise, reverted


@dataclass(frozen=True)
class Square(Body):  # no tag: other tests see all registered bodies
    """The square of the value."""

    def build(self, site: Site, value: Value, edit: Editor) -> fx.Node:
        return edit.call(squared, value.node, name="square")


def squared(x: Tensor) -> Tensor:
    return x * x


def _cat(site: str, gate: GateSpec | None = None) -> Branch:
    return Branch(Selector.parse(site), Bottleneck(2, of="self"), gate, op="cat")


def test_the_reader_gets_columns_for_it() -> None:
    result = done(MLP, _cat("mlp[...].hidden"))
    assert result.error == 0
    module, v = result.program.module, result.values
    down = module.get_parameter("mlp.down.weight")
    assert down.shape == (8, 32)
    assert float(down[:, 16:].detach().abs().min()) > 0  # the branch is 0: were they 0 too, neither would learn
    up = module.get_parameter("mlp.adapter.up")
    torch.nn.init.normal_(up)
    branch = F.gelu(v["act"] @ module.get_parameter("mlp.adapter.down").T) @ up.T
    expected = v["x"] + v["act"] @ down[:, :16].T + branch @ down[:, 16:].T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_columns_start_at_zero_where_the_branch_does_not() -> None:
    text = """
    @up.weight  # 6 8
    @down.weight  # 8 6
    %x = input  # b n 8
    %up = linear(%x, @up.weight)  # b n 6 | up
    %down = linear(%up, @down.weight)  # b n 8 | down
    return %down
    """
    result = done(text, Branch(Selector.parse("linear[up].out"), Square(), op="cat"))
    assert result.error < 1e-6  # the order of the sum
    down = result.program.module.get_parameter("down.weight")
    assert not down[:, 6:].any()
    torch.nn.init.normal_(down)
    up = result.values["up"]
    assert torch.allclose(result.run()[0], torch.cat([up, up**2], -1) @ down.T, atol=1e-5)


@pytest.mark.parametrize("site", ["mlp[...].hidden", "attention[...].hidden"])
def test_saved_decoded_compiled_and_reverted(site: str, tmp_path: Path) -> None:
    plain, inputs = samples.language()
    model = gatecc.transform(plain, _cat(site, GateSpec("self", "linear", "token", "sigmoid", init="zero")), inputs)
    new = new_parameters(model, plain)
    randomise(new.values(), 0.5)
    gradients(model, new, model(*inputs))
    with torch.no_grad():
        expected = model(*inputs)
        assert not torch.allclose(expected, plain(*inputs), atol=1e-3)
        gatecc.save(model, tmp_path / "saved")
        assert torch.equal(gatecc.load(samples.language()[0], tmp_path / "saved")(*inputs), expected)
        first, state = (decoder := gatecc.decoder(model, inputs)).prefill(inputs[0][:, :7])
        last, _ = decoder.step(inputs[0][:, 7:], state)
        assert torch.allclose(torch.cat([first, last], 1), expected, atol=1e-5)
        compiled: Any = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
        assert torch.allclose(compiled(inputs[0][:, :5]), expected[:, :5], atol=1e-5)
    reverted(model, plain, inputs)


def test_all_projections_of_an_attention_grow() -> None:
    plain, inputs = samples.language()
    model: Any = gatecc.transform(plain, _cat("attention[...].hidden"), inputs)
    attn = model.blocks[0].attn
    assert [p.in_features for p in (attn.q_proj, attn.k_proj, attn.v_proj, attn.o_proj)] == [32, 32, 32, 16]


@pytest.mark.parametrize(
    ("site", "found"), [("mlp[...].out", "it is read by sum_1"), ("mlp[...].in", "")], ids=["residual", "in"]
)
def test_readers_that_are_no_linears_are_refused(site: str, found: str) -> None:
    if not found:
        assert done(MLP, _cat(site)).error == 0  # the residual also reads it, as the stream and not as the MLP's input
        return
    with pytest.raises(SiteRefusedError, match=f"cannot be concatenated[\\s\\S]*{found}"):
        done(MLP, _cat(site))


def test_a_weight_that_grew_is_not_widened_twice() -> None:
    with pytest.raises(SiteRefusedError, match=r"cannot take columns of a branch[\s\S]*widened already"):
        done(MLP, _cat("mlp[...].hidden"), _cat("mlp[...].hidden"))
