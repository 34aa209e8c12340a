"""Patterns: what is found, what is not, and the reason that is given."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.ir.dataflow import Flow
from gatecc.ir.ops import CASTS, VIEWS
from gatecc.ir.pattern import Found, Match, Pattern, Patterns, anything, call, constant, one_of, through
from tests.graphs import program_of

A, B, X = anything("a"), anything("b"), anything("x")
INPUT = torch.randn(2, 3, 4)


def found(pattern: Any, function: Callable[..., Tensor], *inputs: Tensor, check: Any = None) -> Found:
    return Patterns(Pattern("piece", pattern, check)).find(Flow(program_of(function, *(inputs or (INPUT,)))))


def only(pattern: Any, function: Callable[..., Tensor], *inputs: Tensor) -> Match:
    (match,) = found(pattern, function, *inputs).matches
    return match


INVERSE = call("rsqrt", call("add", call("mean", call("pow", X, 2), [-1], True), constant(lambda e: 0 < e < 1, "eps")))
RMS = call("mul", call("mul", X, through(CASTS, INVERSE)), anything("weight"))
SPELLINGS: list[Callable[[Tensor, Tensor, Tensor], Tensor]] = [
    lambda x, r, w: x * r * w,
    lambda x, r, w: r * x * w,
    lambda x, r, w: w * (x * r),
    lambda x, r, w: w * (r * x),
]


@settings(max_examples=8, deadline=None)
@given(spelling=st.sampled_from(SPELLINGS), cast=st.booleans(), eps=st.sampled_from([1e-5, 1e-6]))
def test_operands_in_any_order_and_optional_casts(spelling: Any, cast: bool, eps: float) -> None:
    def norm(x: Tensor, w: Tensor) -> Tensor:
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        return spelling(x, inverse.double().float() if cast else inverse, w)

    match = only(RMS, norm, INPUT, torch.randn(4))
    x, w = (n for n in match.root.graph.nodes if n.op == "placeholder")
    assert (match["x"], match["weight"], match.constants["eps"]) == (x, w, eps)
    assert match.inner == {n for n in match.root.graph.nodes if n.op == "call_function"}
    assert match.read_outside == []


@settings(max_examples=8, deadline=None)
@given(order=st.permutations(range(3)), subtract=st.booleans())
def test_an_order_that_matters_is_kept(order: list[int], subtract: bool) -> None:
    """Three tensors, added in any order, less one: only the subtraction tells its operands apart."""
    step = operator.sub if subtract else operator.add
    tensors = [torch.randn(3) for _ in range(3)]

    def function(*x: Tensor) -> Tensor:
        return step(reduce(operator.mul, [x[order[0]], x[order[1]]]), x[order[2]])

    result = found(call("sub", call("mul", A, B), anything("c")), function, *tensors)
    assert len(result.matches) == subtract
    for match in result.matches:
        names = [n.name for n in match.root.graph.nodes if n.op == "placeholder"]
        assert [match[name].name for name in "abc"] == [names[i] for i in order]


def test_a_repeated_name_is_one_value() -> None:
    square = call("mul", X, X)
    assert len(found(square, lambda x: x * x).matches) == 1
    assert not found(square, lambda x: x * (x + 1)).matches
    assert len(found(square, lambda x: x.exp() * x.exp()).matches) == 1, "one call that is written twice"
    assert not found(square, lambda x: x.exp() * x.sin()).matches
    assert not found(square, lambda x: torch.rand_like(x) * torch.rand_like(x)).matches, "random numbers differ"


def test_a_call_before_a_write_is_not_the_one_behind_it() -> None:
    def written(x: Tensor) -> Tensor:
        y = x + 1
        before = y.exp()
        y.mul_(2)
        return before * y.exp()

    assert not found(call("mul", call("exp", A, name="e"), call("exp", A, name="e")), written).matches


def test_arguments_that_are_not_mentioned_have_their_defaults() -> None:
    plain = call("add", A, B)
    assert len(found(plain, torch.add, INPUT, INPUT).matches) == 1
    doubled: Callable[..., Tensor] = lambda x, y: torch.add(x, y, alpha=2)  # noqa: E731
    assert not found(plain, doubled, INPUT, INPUT).matches
    assert len(found(call("add", A, B, ...), doubled, INPUT, INPUT).matches) == 1
    match = only(call("add", A, B, alpha=constant(name="alpha")), doubled, INPUT, INPUT)
    assert match.constants == {"alpha": 2}


def test_constants_are_exact_or_meant_by_a_function() -> None:
    halved = call("mul", X, 0.5)
    assert len(found(halved, lambda x: x * 0.5).matches) == len(found(halved, lambda x: 0.5 * x).matches) == 1
    assert not found(halved, lambda x: x * 0.25).matches
    assert only(call("mul", X, constant(lambda c: c < 1, "c")), lambda x: x * 0.25).constants == {"c": 0.25}
    in_a_tensor = only(call("mul", X, constant(name="c")), lambda x: x * torch.tensor(0.75))
    assert in_a_tensor.constants == {"c": 0.75}
    assert not found(call("mul", X, constant()), lambda x: x * x.mean()).matches, "it depends on an input"
    assert not found(call("softmax", X, 1, ...), lambda x: x.softmax(-1)).matches


def test_overloads_alternatives_and_lists() -> None:
    assert len(found(call("add.Tensor", A, B), lambda x: x + x.sin()).matches) == 1
    assert not found(call("add.out", A, B), lambda x: x + x.sin()).matches
    bend = call("relu silu", X, name="bend")
    assert found(bend, lambda x: x.relu()).matches
    assert not found(bend, lambda x: x.tanh()).matches
    joined = call("cat", [A, call("neg", A)], constant(name="dim"))
    match = only(joined, lambda x: torch.cat([x, -x], -1))
    assert (match["a"].op, match.constants) == ("placeholder", {"dim": -1})
    assert not found(joined, lambda x: torch.cat([x, -x, x], -1)).matches
    biased = call("relu", one_of(call("add", call("sin", X), anything("bias")), call("sin", X)))
    assert "bias" in only(biased, lambda x, b: torch.relu(b + x.sin()), INPUT, torch.randn(4)).nodes
    assert "bias" not in only(biased, lambda x: torch.relu(x.sin())).nodes


def test_through_takes_the_deepest_value_that_fits() -> None:
    seen = call("exp", through(VIEWS, anything("x")))
    match = only(seen, lambda x: x.transpose(0, 1).reshape(3, 8).exp())
    assert match["x"].op == "placeholder"
    assert len(match.inner) == 3
    both = call("mul", X, through(VIEWS, X))  # the name holds the view, not what is behind it
    assert only(both, lambda x: (y := x.reshape(6, 4)) * y).root


def test_what_others_read_is_named() -> None:
    def shared(x: Tensor) -> Tensor:
        e = x.exp()
        return (e + 1) * e.sum()

    match = only(call("add", call("exp", X), 1), shared)
    assert [n.name for n in match.read_outside] == ["exp"]


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        (lambda x: torch.rsqrt(x.pow(3).mean(-1, keepdim=True) + 1e-6), "3 stands where 2 is expected"),
        (lambda x: torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 2), "2 stands where another constant is expected"),
        (lambda x: torch.rsqrt(x.pow(2).mean(1, keepdim=True) + 1e-6), "[1] stands where [-1] is expected"),
        (lambda x: torch.rsqrt(x.pow(2).sum(-1, keepdim=True) + 1e-6), "sum stands where mean is expected"),
    ],
)
def test_a_near_miss_says_why(function: Any, reason: str) -> None:
    result = found(INVERSE, function)
    assert not result.matches
    (miss,) = result.misses
    assert miss.reason == reason
    assert str(miss).startswith("graphs.py:")


def test_what_only_shares_its_root_is_not_mentioned() -> None:
    assert not found(INVERSE, lambda x: torch.rsqrt(x.exp())).misses


def test_a_check_refuses_with_words() -> None:
    def narrow(match: Match) -> str:
        rank = match["x"].meta["val"].dim()
        return "" if rank < 3 else f"it has {rank} axes"

    wide = found(call("exp", X), lambda x: x.exp(), check=narrow)
    assert [miss.reason for miss in wide.misses] == ["it has 3 axes"]
    assert found(call("exp", X), lambda x: x.exp(), torch.randn(2, 3), check=narrow).matches


def test_the_first_pattern_that_fits_is_meant() -> None:
    patterns = Patterns(Pattern("square", call("mul", X, X)), Pattern("product", call("mul", A, B)))
    names = [m.pattern.name for m in patterns.find(Flow(program_of(lambda x: (x * x) * x.sin(), INPUT))).matches]
    assert names == ["square", "product"]


def test_a_pattern_ends_in_an_operator() -> None:
    with pytest.raises(ArgumentError, match="ends in an operator"):
        Patterns(Pattern("nothing", anything()))


def test_finding_is_linear_in_the_graph() -> None:
    """Twice the nodes, twice the looks: each root looks at as many nodes as the pattern has parts."""
    looks: list[int] = []

    def work(layers: int) -> int:
        looks.clear()
        part = call("add", call("mul", anything(where=lambda node: looks.append(1) or ""), A), B)
        found(part, lambda x: reduce(lambda y, _: y * x + x, range(layers), x))
        return len(looks)

    assert work(8) == 2 * work(4) > 0
