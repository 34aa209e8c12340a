"""Folding a factor into the next linear; the golden cases in tests/golden/fold_factor show it."""

from __future__ import annotations

import pytest
import torch

from gatecc.errors import ArgumentError, SiteRefusedError
from gatecc.ir.edit import Editor
from gatecc.ir.gate import GateSpec
from gatecc.ir.select import Selector
from gatecc.ir.weights import ScaleWeight
from gatecc.passes.fold_factor import fold_into_next
from gatecc.passes.gate import Gate
from gatecc.pipeline import prepare
from tests.golden.reader import Reader
from tests.graphs import MLP, attention, done


def _folded(site: str) -> Gate:
    return Gate(Selector.parse(site), GateSpec("self", "linear", "channel", "sigmoid", init="identity(how=fold)"))


@pytest.mark.parametrize(
    ("text", "site", "weight"),
    [(MLP, "mlp[...].hidden", "mlp.down.weight"), (attention(), "attention[...].heads", "att.o.weight")],
)
def test_the_next_weight_takes_the_factor_exactly(text: str, site: str, weight: str) -> None:
    before = Reader(text).program.module.get_parameter(weight)
    result = done(text, _folded(site))
    assert result.error == 0
    assert torch.equal(result.program.module.get_parameter(weight), 2 * before)
    scaled = [step for step in result.steps if isinstance(step, ScaleWeight)]
    assert [(s.path, s.factor) for s in scaled] == [(weight, 2.0)]


def test_a_value_that_is_read_twice_by_linears_scales_both() -> None:
    text = """
    @a.weight  # 4 8
    @b.weight  # 4 8
    @act.weight  # 8 8
    %x = input  # b n 8
    %h = linear(%x, @act.weight)  # b n 8 | act
    %r = relu(%h)  # b n 8 | act
    %p = linear(%r, @a.weight)  # b n 4 | a
    %q = linear(%r, @b.weight)  # b n 4 | b
    return %p, %q
    """
    result = done(text, _folded("activation[...].out"))
    assert result.error == 0
    assert sorted(s.path for s in result.steps if isinstance(s, ScaleWeight)) == ["a.weight", "b.weight"]


@pytest.mark.parametrize("reader", ["add.Tensor(%r, %x)", "softmax.int(%r, -1)", "mul.Tensor(%r, %r)"])
def test_a_value_that_something_else_reads_is_refused(reader: str) -> None:
    text = f"""
    @act.weight  # 8 8
    @next.weight  # 8 8
    %x = input  # b n 8
    %h = linear(%x, @act.weight)  # b n 8 | act
    %r = relu(%h)  # b n 8 | act
    %other = {reader}  # b n 8
    %y = linear(%r, @next.weight)  # b n 8 | next
    return %y, %other
    """
    with pytest.raises(SiteRefusedError, match="cannot be folded") as error:
        done(text, _folded("activation[...].out"))
    assert "2*sigmoid" in str(error.value)


def test_a_weight_with_another_reader_is_refused() -> None:
    text = """
    @w.weight  # 8 8
    %x = input  # b n 8
    %h = linear(%x, @w.weight)  # b n 8 | w
    %r = relu(%h)  # b n 8
    %y = linear(%r, @w.weight)  # b n 8 | w
    return %y
    """
    with pytest.raises(SiteRefusedError, match="cannot be folded"):
        done(text, _folded("activation[...].out"))


def test_only_powers_of_two_fold_exactly() -> None:
    program = Reader(MLP).program
    (site,) = (s for s in prepare(program).found if s.kind == "mlp")
    with pytest.raises(ArgumentError, match="power of two"):
        fold_into_next(Editor(program, site, "test"), site.values["hidden"].node, 3.0)
