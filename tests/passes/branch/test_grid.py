"""GridConv: a branch that convolves tokens in their grid; tests/golden/branch/grid.txt shows it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateSpec
from gatecc.ir.rewrite import rewrite_from_json
from gatecc.ir.select import Selector
from gatecc.ir.site import Attention, Value
from gatecc.passes.branch.branch import Branch
from gatecc.passes.branch.grid import GridConv
from gatecc.pipeline import prepare
from gatecc.scope.variant import Variant
from tests.golden.reader import Reader
from tests.graphs import attention, done

HIDDEN, HEADS, OUT = (Selector.parse(f"attention[...].{stage}") for stage in ("hidden", "heads", "out"))
ROW: dict[str, Any] = {"prefix": 1, "rows": 2, "columns": 1}


def _convolved(x: torch.Tensor, result: Any, keep: bool) -> torch.Tensor:
    """The first token apart, the others in a column of two."""
    conv = result.program.module.get_submodule("att.local.conv")
    found = F.conv2d(x[:, 1:].mT.unflatten(-1, (2, 1)), conv.weight, conv.bias, padding=1, groups=8).flatten(2).mT
    return torch.cat([x[:, :1] if keep else torch.zeros_like(x[:, :1]), found], 1)


def test_it_is_added_to_heads_from_another_stage() -> None:
    result = done(attention(), Branch(HEADS, GridConv(of="hidden", **ROW)))
    merged = result.values["merged"] + _convolved(result.values["x"], result, keep=False)
    assert torch.allclose(result.run()[0], merged @ result.program.module.get_parameter("att.o.weight").T, atol=1e-5)


def test_tokens_may_come_first() -> None:
    """(N, B, C), as inside torch.nn.MultiheadAttention: here the first axis is taken for the tokens."""
    program = Reader(attention()).program
    site = next(s for s in prepare(program).found if isinstance(s, Attention))
    first = replace(site, values={**site.values, "hidden": Value(site.values["hidden"].node, "nbc")})
    edit = Editor(program, first, "branch")
    edit.replace(program.outputs[0], GridConv(rows=2, columns=1).build(first, first.values["hidden"], edit))
    with torch.no_grad():
        got = Variant(program, ())(program.module, program.example)[0]
    conv = program.module.get_submodule("att.local.conv")
    cells = program.example[0].permute(1, 2, 0).unflatten(-1, (2, 1))
    wanted = F.conv2d(cells, conv.get_parameter("weight"), conv.get_parameter("bias"), padding=1, groups=8)
    assert torch.allclose(got, wanted.flatten(2).permute(2, 0, 1), atol=1e-5)


def test_it_takes_the_place_of_an_output_by_degrees() -> None:
    half = GateSpec("param", "none", "scalar", "sigmoid", init="zero")
    result = done(attention(), Branch(OUT, GridConv(rest="keep", **ROW), half, op="lerp"))
    out = result.before[0]
    assert torch.allclose(result.run()[0], 0.5 * out + 0.5 * _convolved(out, result, keep=True), atol=1e-5)


def test_what_starts_at_zero_is_added_without_a_trace() -> None:
    zero = Branch(OUT, GridConv(start="zero", **ROW))
    assert done(attention(), zero).error == 0
    assert str(zero.contract()) == "identity_at_init(1e-06)"
    for other in (Branch(OUT, GridConv(**ROW)), Branch(OUT, GridConv(start="zero", **ROW), op="lerp")):
        assert str(other.contract()) == "changes_function"


def test_only_readers_inside_the_attention_see_a_new_input() -> None:
    text = attention().replace("return %out", "%sum = add.Tensor(%x, %out)  # b n 8\n    return %sum")
    result = done(text, Branch(HIDDEN, GridConv(start="zero", **ROW), op="lerp"))
    assert torch.allclose(result.run()[0], result.values["x"])  # nothing comes from the attention: its input is 0


@pytest.mark.parametrize("tokens", [1, 4, 5, 17])
def test_grids_that_tokens_fill(tokens: int) -> None:
    site = prepare(Reader(attention()).program).found[0]
    squares = {1: (1, 1), 4: (2, 2)}
    if tokens in squares:
        assert GridConv().cells(tokens, site) == squares[tokens]
        return
    with pytest.raises(SiteRefusedError, match="do not fill the grid"):
        GridConv().cells(tokens, site)
    assert GridConv(prefix=1).cells(tokens, site) == ((2, 2) if tokens == 5 else (4, 4))
    with pytest.raises(SiteRefusedError, match="do not fill the grid"):
        GridConv(prefix=tokens).cells(tokens, site)


@pytest.mark.parametrize("mask", [{"causal": True}, {"mask": "%keep", "inputs": "%keep = input  # b 1 1 n bool"}])
def test_a_mask_that_hides_tokens_is_refused(mask: Any) -> None:
    with pytest.raises(SiteRefusedError, match="reads what this mask hides"):
        done(attention(**mask), Branch(HIDDEN, GridConv(**ROW)))


def test_channels_must_be_those_of_the_value() -> None:
    with pytest.raises(SiteRefusedError, match="other channels"):
        done(attention(), Branch(Selector.parse("attention[...].v"), GridConv(of="hidden", **ROW)))


@pytest.mark.parametrize("options", [{"kernel": 2}, {"prefix": -1}, {"rows": 2}])
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ArgumentError):
        GridConv(**options)


@pytest.mark.parametrize("gate", [None, GateSpec("param", "none", "scalar", "tanh", init="zero")])
def test_a_branch_is_plain_data_with_a_gate_and_without(gate: GateSpec | None) -> None:
    branch = Branch(HEADS, GridConv(of="hidden", **ROW), gate)
    assert rewrite_from_json(branch.to_json()) == branch
