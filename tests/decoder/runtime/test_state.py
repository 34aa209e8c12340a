"""The state is a plain tree of tensors: saved, copied, resumed, stepped twice; it never changes under its holder."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils import _pytree as pytree

import gatecc
from gatecc.decoder import Decoder
from gatecc.errors import ArgumentError
from tests.decoder.stepping import difference, full, stepped
from tests.zoo import SPECS

LENGTH = 40


@pytest.fixture(scope="module", params=["hand/sdpa_causal", "hand/sliding"])
def made(request: pytest.FixtureRequest) -> tuple[nn.Module, Decoder, torch.Tensor, torch.Tensor]:
    case = SPECS[str(request.param)].build()
    x = case.make(2, LENGTH).args[0]
    return case.model, gatecc.decoder(case.model, case.inputs), x, full(case.model, x)


Made = tuple[nn.Module, Decoder, torch.Tensor, torch.Tensor]


@given(data=st.data())
def test_any_pieces_give_the_full_forward(made: Made, data: st.DataObject) -> None:
    _, decoder, x, expected = made
    pieces: list[int] = []
    while sum(pieces) < LENGTH:
        pieces.append(data.draw(st.integers(1, LENGTH - sum(pieces))))
    assert difference(expected, stepped(decoder, x, pieces)) <= 1e-5


def test_every_batch_works(made: Made) -> None:
    model, decoder, x, _ = made
    for batch in (1, 3):
        ids = torch.cat([x, x])[:batch]
        assert difference(full(model, ids), stepped(decoder, ids, (5, 1, 34))) <= 1e-5


def test_a_state_is_unchanged_by_what_is_stepped_from_it(made: Made) -> None:
    _, decoder, x, expected = made
    _, state = decoder.prefill(x[:, :9])
    kept = copy.deepcopy(state)
    other = x.flip(1)
    decoder.prefill(other[:, :20], state)  # a branch, longer than what follows
    for i in range(9, 30):
        logits, state = decoder.prefill(x[:, i : i + 1], state)
        assert difference(expected[:, i : i + 1], logits) <= 1e-5
    logits, _ = decoder.prefill(x[:, 9:20], kept)
    assert difference(expected[:, 9:20], logits) <= 1e-5


def test_branches_of_one_state_do_not_meet(made: Made) -> None:
    _, decoder, x, expected = made
    _, state = decoder.prefill(x[:, :9])
    one, other = state, state
    for i in range(9, 25):
        logits, one = decoder.prefill(x[:, i : i + 1], one)
        _, other = decoder.prefill(x[:, LENGTH - i : LENGTH - i + 1], other)
        assert difference(expected[:, i : i + 1], logits) <= 1e-5


def test_it_is_saved_and_resumed(made: Made) -> None:
    _, decoder, x, expected = made
    _, state = decoder.prefill(x[:, :9])
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(state))
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: Any = torch.load(file)
    logits, _ = decoder.prefill(x[:, 9:], loaded)
    assert difference(expected[:, 9:], logits) <= 1e-5


def test_a_window_keeps_no_more_than_it_sees(made: Made) -> None:
    _, decoder, x, _ = made
    _, state = decoder.prefill(x)
    for i in range(20):
        _, state = decoder.prefill(x[:, i : i + 1], state)
    sizes = {buffer.shape[slot.axis] for slot, buffer in zip(decoder.plan.slots, state["slots"], strict=True)}
    windows = decoder.plan.windows
    assert max(sizes) <= (2 * windows[0] if windows else 2 * (LENGTH + 20))


def test_room_is_fixed_where_that_is_asked_for() -> None:
    case = SPECS["hand/sdpa_causal"].build()
    decoder = gatecc.decoder(case.model, case.inputs, capacity=20)
    x = case.make(2, 20).args[0]
    _, state = decoder.prefill(x)
    assert {buffer.shape[2] for buffer in state["slots"]} == {20}
    with pytest.raises(ArgumentError, match="room for 20"):
        decoder.prefill(x[:, :1], state)
    with pytest.raises(ArgumentError, match="another batch"):
        decoder.prefill(x[:1, :1], decoder.prefill(x[:, :3])[1])


def test_tables_follow_the_parameters() -> None:
    case = SPECS["hf/gpt2-eager"].build()
    ids = case.kwargs["input_ids"]
    decoder = gatecc.decoder(case.model, case.inputs)
    stepped(decoder, ids)
    with torch.no_grad():
        for parameter in case.model.parameters():
            parameter.mul_(1.05)
    assert difference(full(case.model, ids), stepped(decoder, ids)) <= 1e-5
    with pytest.raises(ArgumentError, match="positions for 128"):
        decoder.prefill(ids.repeat(1, 9))
