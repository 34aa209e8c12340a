"""RNN, GRU and LSTM layers decode by their states; the length of their graphs is free."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, DecoderError
from gatecc.ops.rnn import rnn
from tests.decoder.mixing import D, Mixed, V
from tests.decoder.stepping import difference, full, stepped

IDS = torch.randint(V, (2, 9))
LONG = torch.randint(V, (3, 16))


class Layers(nn.Module):
    """A recurrent layer, batch or time first, from zero or a learned state, whose last state may be read too."""

    def __init__(
        self, cell: Any = nn.GRU, *, first: bool = True, start: bool = False, last: bool = False, **options: Any
    ):
        super().__init__()
        self.first, self.last = first, last
        self.rnn = cell(D, D, batch_first=first, **options)
        self.start = nn.Parameter(torch.randn(1, 1, D)) if start else None

    def count(self, x: Tensor) -> int:
        """The number of samples."""
        return x.shape[0]

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        state = None if self.start is None else self.start.expand(-1, self.count(x), -1).contiguous()
        given = (state, state) if state is not None and isinstance(self.rnn, nn.LSTM) else state
        y, after = self.rnn(x if self.first else x.transpose(0, 1), given)
        y = y if self.first else y.transpose(0, 1)
        return y[..., :D] + after[-1].unsqueeze(1) if self.last else y[..., :D]


class Scored(nn.Module):
    """A layer as a recurrent gate has it: one operator, from no state."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTM(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return rnn(x, *self.cell.parameters(), "lstm")[0]


@pytest.mark.parametrize(
    "layers",
    [
        Layers(num_layers=2),
        Layers(nn.LSTM, start=True),
        Layers(nn.RNN, first=False),
        Layers(nn.RNN, nonlinearity="relu", start=True),
        Scored(),
    ],
    ids=["gru", "lstm", "rnn, time first", "relu", "gate"],
)
def test_steps_are_the_full_forward(layers: nn.Module) -> None:
    model = Mixed(layers).eval()
    made = gatecc.decoder(model, (IDS,))
    assert {slot.kind for slot in made.plan.slots} == {"state"}
    assert difference(full(model, LONG), stepped(made, LONG)) <= 1e-5
    _, state = made.prefill(LONG)
    with pytest.raises(ArgumentError, match="another batch"):
        made.step(LONG[:2, 0], state)


class Counted(Layers):
    """A batch that is counted by Python, which makes it a number in the graph."""

    def count(self, x: Tensor) -> int:
        """The number of samples."""
        return len(x)


class Translation(nn.Module):
    """A decoder that starts from what an encoder says of the source."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.encoder, self.rnn = nn.Embedding(V, D), nn.Linear(4, D), nn.GRU(D, D, batch_first=True)

    def forward(self, ids: Tensor, source: Tensor) -> Tensor:
        """ids: (B, N), source: (B, 4) -> (B, N, D)"""
        return self.rnn(self.embed(ids), self.encoder(source).unsqueeze(0))[0]


def test_a_state_that_an_encoder_makes() -> None:
    model = Translation().eval()
    made = gatecc.decoder(model, {"ids": IDS, "source": torch.randn(2, 4)})
    source = torch.randn(3, 4)
    state = made.init_state(3, context={"source": source})
    parts: list[Tensor] = []
    for piece in LONG.split((7, 1, 1, 3, 4), 1):
        logits, state = made.prefill(piece, state)
        parts.append(logits)
    assert difference(full(model, LONG, source), torch.cat(parts, 1)) <= 1e-5


class FromTokens(Translation):
    """A decoder that starts from the mean of what it reads."""

    def forward(self, ids: Tensor, source: Tensor) -> Tensor:
        """ids: (B, N), source: (B, 4) -> (B, N, D)"""
        x = self.embed(ids)
        return self.rnn(x, self.embed(ids[:, :1]).transpose(0, 1) + 0 * source.sum())[0]


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Mixed(Layers(bidirectional=True)), "both directions"),
        (Mixed(Layers(last=True)), "the state after the last token"),
        (Mixed(Counted(nn.LSTM, start=True)), "the batch is fixed"),
        (FromTokens(), "mixes positions|depends on the tokens"),
    ],
    ids=["both directions", "last state", "one batch", "start from tokens"],
)
def test_what_sees_later_tokens_is_refused_by_node(model: nn.Module, reason: str) -> None:
    inputs = (IDS, torch.randn(2, 4)) if isinstance(model, Translation) else (IDS,)
    with pytest.raises(DecoderError, match=reason):
        gatecc.decoder(model.eval(), inputs)


class Patches(nn.Module):
    """A layer over the channels of each token, which mixes no tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(4, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return self.rnn(x.reshape(-1, 4, D // 4))[0].reshape(x.shape)


def test_layers_along_another_axis_are_no_mixers() -> None:
    model = Mixed(Patches()).eval()
    made = gatecc.decoder(model, (IDS,))
    assert not made.plan.slots
    assert difference(full(model, LONG), stepped(made, LONG)) <= 1e-5
