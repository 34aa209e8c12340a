"""Encoders run once for a text: steps read what they left in the state."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from tests.decoder.stepping import PIECES, difference, full
from tests.zoo import SPECS

SEQ2SEQ = ("hf/t5-eager", "hf/bart-sdpa", "hf/pegasus-eager")


def stepped(made: Any, ids: Tensor, **context: Tensor) -> Tensor:
    """All logits in pieces; the context is given once."""
    state = made.init_state(ids.shape[0], context=context)
    parts: list[Tensor] = []
    start = 0
    for piece in PIECES:
        logits, state = made.prefill(ids[:, start : start + piece], state)
        parts.append(logits)
        start += piece
    return torch.cat(parts, 1)


@pytest.mark.parametrize("name", SEQ2SEQ)
def test_a_text_after_another_one_than_that_of_the_capture(name: str) -> None:
    case = SPECS[name].build()
    source, ids = case.kwargs["input_ids"], case.kwargs["decoder_input_ids"]
    made = gatecc.decoder(case.model, {"input_ids": source, "decoder_input_ids": ids})
    another = torch.randint(3, 40, (3, source.shape[1] + 4))
    ids = torch.randint(3, 40, (3, sum(PIECES)))
    expected = full(case.model, input_ids=another, decoder_input_ids=ids)
    assert difference(expected, stepped(made, ids, input_ids=another)) <= 1e-5
    assert not re.search("encoder_(layers|block)", made.lowered().code), "steps do not run the encoder"
    assert torch.equal(
        made.generate(ids[:, :1], 4, input_ids=another)[:, :2],
        torch.cat([ids[:, :1], expected[:, :1].argmax(-1)], 1),
    )


def test_padding_of_the_encoder_is_hidden_from_every_step() -> None:
    case = SPECS["hf/bart-sdpa"].build()
    source, ids = case.kwargs["input_ids"], case.kwargs["decoder_input_ids"]
    mask = torch.ones_like(source)
    inputs = {"input_ids": source, "attention_mask": mask, "decoder_input_ids": ids}
    made = gatecc.decoder(case.model, inputs)
    mask = mask.clone()
    mask[0, -2:] = 0
    ids = torch.randint(3, 40, (len(source), sum(PIECES)))
    expected = full(case.model, **{**inputs, "attention_mask": mask, "decoder_input_ids": ids})
    assert difference(expected, stepped(made, ids, input_ids=source, attention_mask=mask)) <= 1e-5
    changed = source.clone()
    changed[0, -2:] = 1
    again = stepped(made, ids, input_ids=changed, attention_mask=mask)
    assert difference(expected, again) <= 1e-5


def test_an_encoders_output_is_context_as_its_input_is() -> None:
    """The memory of nn.TransformerDecoder is a tensor of features."""
    case = SPECS["torch/decoder"].build()
    made = gatecc.decoder(case.model, case.inputs)
    assert "memory" in made.context.names


class Conditioned(nn.Module):
    """An embedding of a class, of fixed size, added to every token."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.classes, self.head = nn.Embedding(20, 8), nn.Linear(6, 8), nn.Linear(8, 20)
        self.calls = 0

    def forward(self, ids: Tensor, features: Tensor) -> Tensor:
        return self.head(self.embed(ids) + self.classes(features).tanh()[:, None])


def test_what_is_wrong_with_a_context_is_said() -> None:
    model = Conditioned().eval()
    ids, features = torch.randint(20, (2, 9)), torch.randn(2, 6)
    made = gatecc.decoder(model, {"ids": ids, "features": features})
    assert made.plan.context != made.plan.inputs.context, "the features are projected once"
    logits, _ = made.prefill(ids, features=features)
    assert difference(full(model, ids, features), logits) <= 1e-6
    with pytest.raises(ArgumentError, match="not what the model was captured with"):
        made.prefill(ids)
    with pytest.raises(ArgumentError, match="not of the shape"):
        made.prefill(ids, features=features[:, :5])
    with pytest.raises(ArgumentError, match="not of the shape"):
        made.prefill(ids, features=features[:1])
    state = made.init_state(2, context={"features": features})
    with pytest.raises(ArgumentError, match="without this input"):
        made.prefill(ids, state, features=features)
