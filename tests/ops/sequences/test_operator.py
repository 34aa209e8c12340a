"""gatecc::sequences: what a mask says about padding and packed rows, and that every other mask raises."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from gatecc.errors import MaskFormError
from gatecc.ops.sequences import sequences

ROWS = torch.tensor(
    [[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 2, 2, 2, 3], [1, 0, 1, 2, 0, 2], [0, 0, 0, 0, 0, 0]]
)
FORMS = [(False, None), (True, None), (True, 3)]


def mask_of(rows: Tensor, causal: bool, window: int | None = None) -> Tensor:
    """(B, 1, N, N): a query sees the keys of its sequence, key by key."""
    n = rows.size(1)
    mask = torch.zeros(rows.size(0), 1, n, n, dtype=torch.bool)
    for b, i, j in itertools.product(range(rows.size(0)), range(n), range(n)):
        near = i - j < (window or n) and (j <= i or not causal)
        mask[b, 0, i, j] = bool(rows[b, i] == rows[b, j] != 0) and near
    return mask


def added(mask: Tensor, low: float) -> Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, low)


@pytest.mark.parametrize(("causal", "window"), FORMS)
@pytest.mark.parametrize("low", [None, -1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_sequences_are_read_from_the_mask(causal: bool, window: int | None, low: float | None) -> None:
    rows = ROWS.clone()
    if window:
        rows[3] = torch.tensor([1, 0, 1, 1, 0, 2])
    mask = mask_of(rows, causal, window)
    assert torch.equal(sequences(mask if low is None else added(mask, low), causal, window), rows)


def test_what_padding_sees_does_not_matter() -> None:
    mask = mask_of(ROWS[:2], True)
    mask[0, 0, 0, 1:] = True
    mask[1, 0, 4:, :3] = True
    assert torch.equal(sequences(mask, True), ROWS[:2])


@pytest.mark.parametrize("causal", [True, False])
def test_tokens_that_see_others_and_not_themselves_are_no_padding(causal: bool) -> None:
    mask = mask_of(ROWS[:2], causal) & ~torch.eye(6, dtype=torch.bool)
    for form in (mask, added(mask, -1e4)):
        with pytest.raises(MaskFormError, match="token 3 sees the keys" if causal else "token 2 sees the keys"):
            sequences(form, causal)


def test_one_row_for_all_queries_says_padding() -> None:
    keep = ROWS[:2] > 0
    assert torch.equal(sequences(keep[:, None, None], False), keep.long())
    with pytest.raises(MaskFormError, match="GCC180"):
        sequences(keep[:, None, None], True)
    assert torch.equal(sequences(torch.ones(3, 1, 1, 1, dtype=torch.bool), True), torch.ones(3, 1).long())


def _prefix(mask: Tensor) -> Tensor:
    mask[0, 0, 2, 4] = True  # a token sees a later one
    return mask


def _hole(mask: Tensor) -> Tensor:
    mask[1, 0, 3, 1] = False
    return mask


def _heads(mask: Tensor) -> Tensor:
    mask = mask.repeat(1, 2, 1, 1)
    mask[1, 1, 3, 1] = False
    return mask


def _bias(mask: Tensor) -> Tensor:
    scores = added(mask, -1e4)
    scores[1, 0, 2, 1] = 0.5
    return scores


@pytest.mark.parametrize("spoil", [_prefix, _hole, _heads, _bias])
def test_another_form_raises_and_says_what_was_found(spoil: Any) -> None:
    with pytest.raises(MaskFormError, match=r"in row [01] of the mask") as error:
        sequences(spoil(mask_of(ROWS[:2], True)), True)
    assert error.value.code == "GCC180"
    assert error.value.do
    assert isinstance(error.value, RuntimeError)


def test_the_other_direction_raises() -> None:
    with pytest.raises(MaskFormError, match="earlier tokens"):
        sequences(mask_of(ROWS[:2], False), True)
    with pytest.raises(MaskFormError, match="all tokens"):
        sequences(mask_of(ROWS[:2], True), False)
    with pytest.raises(MaskFormError, match="the last 3"):
        sequences(mask_of(ROWS[:2], True), True, 3)


def test_a_bias_is_allowed_where_it_was_proved() -> None:
    mask = mask_of(ROWS[:2], True)
    distance = torch.arange(6.0)[:, None] - torch.arange(6.0)
    for low in (-1e4, -1e9, -1e30, torch.finfo(torch.float32).min, -torch.inf):
        for bias in (torch.randn(2, 4, 6, 6), -100 * distance.abs()):
            assert torch.equal(sequences(added(mask, low) + bias, True, biased=True), ROWS[:2])
    assert torch.equal(sequences(-1000 * distance[None, None].abs(), False, biased=True), torch.ones(1, 6).long())


def test_packed_rows_raise_for_who_cannot_keep_them_apart() -> None:
    assert torch.equal(sequences(mask_of(ROWS[:2], True), True, packed=False), ROWS[:2])
    with pytest.raises(MaskFormError, match="3 sequences in row 2"):
        sequences(mask_of(ROWS, True), True, packed=False)


def test_a_mask_with_a_cache_is_no_square() -> None:
    with pytest.raises(MaskFormError, match="row for each query"):
        sequences(torch.ones(2, 1, 3, 6, dtype=torch.bool), True)


def test_a_result_is_remembered_until_the_mask_changes() -> None:
    mask = mask_of(ROWS[:2], True)
    first = sequences(mask, True)
    assert sequences(mask, True).data_ptr() == first.data_ptr()
    view = mask[:, :, :, :6]
    assert sequences(view, True).data_ptr() == sequences(mask[:, :, :, :6], True).data_ptr()
    mask[0, 0, 2, 4] = True
    with pytest.raises(MaskFormError):
        sequences(mask, True)
    mask.copy_(mask_of(ROWS[2:4], True))
    assert torch.equal(sequences(mask, True), ROWS[2:4])


def test_views_of_a_mask_are_told_apart() -> None:
    mask = mask_of(ROWS[:4], True)
    assert torch.equal(sequences(mask[:2], True), ROWS[:2])
    assert torch.equal(sequences(mask[2:4], True), ROWS[2:4])


def test_inference_tensors_are_read_each_time() -> None:
    with torch.inference_mode():
        mask = mask_of(ROWS[:2], True)
        assert torch.equal(sequences(mask, True), ROWS[:2])
        mask[0, 0, 2, 4] = True
        with pytest.raises(MaskFormError):
            sequences(mask, True)


def test_threads_do_not_share_what_they_remember() -> None:
    masks = [mask_of(ROWS[i : i + 1], True) for i in range(4)]
    wrong: list[int] = []

    def work(i: int) -> None:
        for _ in range(50):
            if not torch.equal(sequences(masks[i], True), ROWS[i : i + 1]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_vmap_runs_over_the_samples() -> None:
    masks = torch.stack([mask_of(ROWS[:2], True), mask_of(ROWS[2:4], True)], 2)
    found = torch.func.vmap(lambda mask: sequences(mask, True), in_dims=2)(masks)
    assert torch.equal(found, torch.stack([ROWS[:2], ROWS[2:4]]))


def test_the_operator_keeps_the_rules_of_operators() -> None:
    mask = mask_of(ROWS[:2], True)
    torch.library.opcheck(torch.ops.gatecc.sequences.default, (mask, True, 0, False, True))
    scores = added(mask, -1e4).requires_grad_()
    torch.library.opcheck(torch.ops.gatecc.sequences.default, (scores, True, 0, False, True))
