"""The branch rewrite; the golden cases in tests/golden/branch show it."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gatecc.errors import SiteRefusedError
from gatecc.ir.gate import GateSpec
from gatecc.ir.mask import Mask
from gatecc.ir.select import Selector
from gatecc.ir.site import Attention
from gatecc.passes.branch.branch import Branch, starts_at_zero
from gatecc.passes.branch.prefix_sum import PrefixSum, kept_key_sum, key_sum, visible
from gatecc.pipeline import prepare
from tests.golden.reader import Reader
from tests.graphs import MLP, attention, done


def _sum(init: str = "random(std=1)", site: str = "attention[...].heads") -> Branch:
    return Branch(Selector.parse(site), PrefixSum(), GateSpec("hidden", "linear", "head", "tanh", init=init))


@pytest.mark.parametrize("causal", [True, False])
def test_the_sum_of_the_values_that_a_query_sees(causal: bool) -> None:
    result = done(attention(causal), _sum())
    v = result.values
    gate = result.program.module.get_submodule("att.branch")
    g = torch.tanh(v["x"] @ gate.get_parameter("weight").T + gate.get_parameter("bias")).transpose(1, 2).unsqueeze(-1)
    seen = torch.ones(3, 3).tril() if causal else torch.ones(3, 3)
    heads = v["heads"] + g * (seen @ v["vr"])
    expected = heads.transpose(1, 2).flatten(2) @ result.program.module.get_parameter("att.o.weight").T
    assert torch.allclose(result.run()[0], expected, atol=1e-5)


def test_it_starts_as_the_identity_and_says_so() -> None:
    assert done(attention(), _sum("zero")).error == 0
    assert str(_sum("zero").contract()) == "identity_at_init(1e-06)"
    assert str(_sum().contract()) == "changes_function"


@pytest.mark.parametrize(
    ("spec", "zero"),
    [
        (GateSpec("hidden", "linear", "head", "tanh", init="zero"), True),
        (GateSpec("param", "none", "scalar", "linear", init="zero"), True),
        (GateSpec("hidden", "linear", "head", "sigmoid", init="zero"), False),
        (GateSpec("hidden", "linear", "head", "tanh", init="random(std=1)"), False),
        (GateSpec("hidden", "linear", "channel", "softmax", init="zero"), False),
    ],
)
def test_which_gates_start_at_zero(spec: GateSpec, zero: bool) -> None:
    assert starts_at_zero(spec) is zero


@given(n=st.integers(1, 9), window=st.integers(1, 12), axis=st.integers(1, 2))
def test_windowed_sums_are_sums_over_windows(n: int, window: int, axis: int) -> None:
    shape = [2, 3, 4]
    shape[axis] = n
    v = torch.randn(shape, dtype=torch.float64).movedim(axis, 0)
    expected = torch.stack([v[max(0, i - window + 1) : i + 1].sum(0) for i in range(n)]).movedim(0, axis)
    assert torch.allclose(key_sum(v.movedim(0, axis), axis, True, window), expected)


def test_masks_that_positions_do_not_tell_are_refused() -> None:
    mask = Mask("unknown", reason="it depends on the data")
    program = Reader(attention()).program
    (site,) = (s for s in prepare(program).found if isinstance(s, Attention))
    with pytest.raises(SiteRefusedError, match="cannot be summed") as error:
        visible(mask, site)
    assert str(mask) in str(error.value)
    assert mask.reason in str(error.value)


def test_a_mask_that_is_an_input_is_refused_where_it_stands() -> None:
    text = attention(mask="%mask", inputs="%mask = input  # n n bool")
    with pytest.raises(SiteRefusedError, match="cannot be summed"):
        done(text, _sum())


@pytest.mark.parametrize("axes", ["bhnd", "bnhd"])
@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, None), (True, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_padding_and_other_sequences_are_left_out_of_the_sums(
    axes: str, causal: bool, window: int | None, packed: bool
) -> None:
    rows = torch.tensor([[0, 1, 1, 0, 1, 2, 2, 3, 0], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    mask = rows if packed else rows > 0
    v = torch.randn(2, 2, 9, 3, dtype=torch.float64)
    seen = (rows[:, :, None] == rows[:, None] if packed else torch.ones(2, 9, 9) > 0) & (rows > 0)[:, None]
    distance = torch.arange(9)[:, None] - torch.arange(9)
    seen = seen & ((distance >= 0) & (distance < (window or 9)) if causal else distance == distance)
    expected = seen[:, None].double() @ v
    order = [axes.index(a) for a in "bhnd"]
    got = kept_key_sum(v.permute(order), mask, 0, axes.index("n"), causal, window).permute(order)
    tokens = (rows > 0)[:, None, :, None]
    assert torch.allclose(got * tokens, expected * tokens)


def test_only_attention_has_keys_to_sum() -> None:
    with pytest.raises(SiteRefusedError, match="has no value 'v'"):
        done(
            MLP,
            Branch(Selector.parse("mlp[...].out"), PrefixSum(), GateSpec("in", "linear", "token", "tanh", init="zero")),
        )
