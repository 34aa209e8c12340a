"""The truth is true: checked on attention whose answer is plain to see, and against counts made in another way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.zoo import SPECS, Spec, find, observe, variants
from tests.zoo.truth import mask_kind


class Calls(nn.Module):
    """Runs one function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, *args: Tensor) -> Tensor:
        return self.function(*args)


def qkv(queries: int = 5, keys: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 3, queries, 4), torch.randn(2, 3, keys, 4), torch.randn(2, 3, keys, 6)


@given(n=st.integers(2, 12), width=st.integers(1, 11), copies=st.integers(1, 3))
def test_mask_kind(n: int, width: int, copies: int) -> None:
    row, column = torch.arange(n)[:, None], torch.arange(n)
    band = ((column <= row) & (column > row - width)).expand(copies, n, n)
    assert mask_kind(band) == ("causal" if width >= n else f"sliding:{width}")
    assert mask_kind(torch.ones(copies, n, n + 1, dtype=torch.bool)) == "bidirectional"
    if width > 1:
        assert mask_kind(band.mT) == "other"
    assert mask_kind(torch.stack([band[0], torch.ones_like(band[0])])) == "varied"


def test_shapes_of_a_cross_attention() -> None:
    truth = observe(Calls(lambda q, k, v: (q @ k.mT).softmax(-1) @ v), qkv())
    (core,) = truth.cores
    assert (core.spelling, core.queries, core.keys, core.owner) == ("softmax", 5, 7, "")


@pytest.mark.parametrize("shape", [(2, 3, 5, 4), (2, 5, 4)])
def test_sdpa_is_one_core_in_every_backend(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape)
    (core,) = observe(Calls(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True)), (x,)).cores
    assert (core.spelling, core.mask) == ("sdpa", "causal")


def test_a_bare_softmax_is_none() -> None:
    truth = observe(Calls(lambda q, k, v: (q @ k.mT).softmax(-1)), qkv())
    assert not truth.cores
    assert [other.reason for other in truth.others] == ["result meets no values in a product"]


def test_a_softmax_over_the_other_axis_is_none() -> None:
    """Slots compete for tokens: the rows that meet the values do not sum to one."""
    truth = observe(Calls(lambda q, k, v: (q @ k.mT).softmax(-2) @ v), qkv())
    assert not truth.cores


def test_weights_that_are_changed_are_none() -> None:
    truth = observe(Calls(lambda q, k, v: (0.5 * (q @ k.mT).softmax(-1)) @ v), qkv())
    assert [other.reason for other in truth.others] == ["result is changed before it meets the values"]


def test_masking_after_the_softmax_changes_nothing() -> None:
    def twice_masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        later = torch.ones(5, 5, dtype=torch.bool).triu(1)
        return (q @ k.mT).masked_fill(later, -1e30).softmax(-1).masked_fill(later, 0.0) @ v

    (core,) = observe(Calls(twice_masked), qkv(5, 5)).cores
    assert core.mask == "causal"


def test_an_exponential_that_is_no_softmax_is_none() -> None:
    truth = observe(Calls(lambda q, k, v: torch.exp(-(q @ k.mT).abs()) @ v), qkv())
    assert not truth.cores
    assert not truth.others


def test_fully_masked_rows() -> None:
    """A row with no key sums to nought in SDPA."""
    seen = torch.ones(5, 7, dtype=torch.bool)
    seen[2] = False
    (core,) = observe(Calls(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)), qkv()).cores
    assert core.mask == "other"


def test_the_model_is_left_as_it_was() -> None:
    def fails(x: Tensor) -> Tensor:
        raise ValueError("on purpose")

    model = nn.Sequential(nn.Linear(4, 4), Calls(fails))
    with pytest.raises(ValueError, match="on purpose"):
        observe(model, (torch.randn(2, 4),))
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
    assert torch.backends.mha.get_fastpath_enabled()
    assert torch.is_grad_enabled()


SDPA = [pytest.param(spec, id=name) for name, spec in variants() if spec.impl == "sdpa"]


@pytest.mark.parametrize("spec", SDPA)
def test_sdpa_cores_are_the_calls_of_sdpa(spec: Spec, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted in another way: by replacing the function."""
    case = spec.build()
    cores = observe(case.model, case.args, case.kwargs).cores
    calls: list[int] = []
    original = F.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    case.model(*case.args, **case.kwargs)
    assert len(calls) == sum(core.spelling == "sdpa" for core in cores)


@pytest.mark.parametrize("spec", [param for param in SDPA if str(param.id).replace("-sdpa", "-eager") in SPECS])
def test_owners_do_not_depend_on_the_spelling(spec: Spec) -> None:
    one, two = spec.build(), find(spec.id.replace("-sdpa", "-eager")).build()
    assert observe(one.model, *one.inputs).owners == observe(two.model, *two.inputs).owners
