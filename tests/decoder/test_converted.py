"""A converted model decodes by the states of its mixers; transformers give layers masks that alone prove nothing."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

import gatecc
from tests.decoder.mixing import D, Mixed, V
from tests.decoder.stepping import PIECES, difference, full, stepped


def llama(layers: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": layers}
    return LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()


def test_a_hybrid_of_linear_and_softmax_layers_decodes_step_by_step() -> None:
    ids = torch.randint(0, 32, (2, 9))
    recipe = gatecc.recipe("gla", keep="1", feature="hedgehog", rope=True, normalize=True, norm=False, gate=False)
    model: Any = gatecc.transform(llama(2), recipe, {"input_ids": ids})
    made = gatecc.decoder(model, {"input_ids": ids})
    with torch.no_grad():
        full = model(input_ids=ids).logits
        got, state = made.prefill(ids[:, :4])
        parts = [got]
        for t in range(4, 9):
            got, state = made.step(ids[:, t : t + 1], state)
            parts.append(got)
    decoded = torch.cat([x if x.dim() == 3 else x.unsqueeze(1) for x in parts], 1)
    assert torch.allclose(decoded, full[:, -decoded.size(1) :], atol=1e-5)


@pytest.mark.parametrize("recipe", [gatecc.recipe("liger", window=4), gatecc.recipe("gla", conv=4)], ids=str)
def test_the_state_does_not_grow_with_the_length(recipe: Any) -> None:
    ids = torch.randint(0, 32, (2, 9))
    model: Any = gatecc.transform(llama(1), recipe, {"input_ids": ids})
    made = gatecc.decoder(model, {"input_ids": ids})
    long = torch.randint(0, 32, (2, 50))
    pieces = (7, 1, 1, 30, 1, 10)  # prefills longer than two windows
    assert difference(full(model, input_ids=long), stepped(made, long, pieces)) <= 1e-5
    sizes: list[int] = []
    for length in (9, 40, 100):
        _, state = made.prefill(torch.randint(0, 32, (2, length)))
        sizes.append(held(state))
        _, state = made.step(torch.randint(0, 32, (2,)), state)
        assert held(state) <= 2 * sizes[0]
    assert len(set(sizes)) == 1


def hybrid() -> tuple[Any, torch.Tensor]:
    """A llama with LoLCATs, whose learned weights are no longer those of the start."""
    ids = torch.randint(0, 32, (2, 16))
    model: Any = gatecc.transform(llama(1), gatecc.recipe("lolcats", window=4), {"input_ids": ids})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer" in name:
                parameter.normal_()
    return model, ids


def recurrent() -> tuple[Any, torch.Tensor]:
    """A language model of two GRU layers, converted to PGN, and an LSTM that stays."""
    ids = torch.randint(V, (2, 16))
    torch.manual_seed(0)
    plain = Mixed(nn.Sequential(Outputs(nn.GRU(D, D, 2, batch_first=True)), Outputs(nn.LSTM(D, D, batch_first=True))))
    recipe = gatecc.recipe("pgn", window=4, keep="mixer.1.layer")
    return gatecc.transform(plain.eval(), recipe, (ids,), scope="model"), ids


class Outputs(nn.Module):
    """The outputs of a recurrent layer, without its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


@pytest.mark.parametrize(
    ("build", "kinds"),
    [
        (hybrid, ["keys", "keys", "taps", "taps", "state"]),
        (recurrent, ["taps", "taps", "state", "state"]),
    ],
    ids=["lolcats", "pgn"],
)
def test_windows_and_delays_decode(build: Any, kinds: list[str]) -> None:
    """Steps, a text that goes on from a saved state, and what is generated are the full forward."""
    model, ids = build()
    made = gatecc.decoder(model, (ids,))
    assert [slot.kind for slot in made.plan.slots] == kinds
    expected = full(model, ids)
    assert difference(expected, stepped(made, ids)) <= 1e-5
    _, state = made.prefill(ids[:, :7])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    logits, _ = made.prefill(ids[:, 7:], torch.load(file))
    assert difference(expected[:, 7:], logits) <= 1e-5
    text = ids[:, :9]
    for _ in range(5):
        text = torch.cat([text, full(model, text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(ids[:, :9], 5), text)
    sizes = [held(made.prefill(ids.repeat(1, times))[1]) for times in (1, 4)]
    assert sizes[0] == sizes[1], "the state does not grow with the length"


def test_left_padding_is_hidden_from_windows_and_from_states() -> None:
    ids, mask = torch.randint(0, 32, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": mask, "position_ids": torch.arange(16).expand(2, 16).contiguous()}
    model: Any = gatecc.transform(llama(1), gatecc.recipe("lolcats", window=4), inputs, scope="model")
    made = gatecc.decoder(model, inputs)
    mask = mask.clone()
    mask[0, :6] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)}
    expected, seen = full(model, input_ids=ids, **given), mask.bool()
    assert difference(expected[seen], stepped(made, ids, PIECES, **given)[seen]) <= 1e-5
    alone, _ = made.prefill(ids[:1, 6:])
    assert difference(expected[:1, 6:], alone) <= 1e-5
    together = made.generate(ids, 4, attention_mask=mask)
    assert torch.equal(together[:1, 6:], made.generate(ids[:1, 6:], 4))


def held(state: Any) -> int:
    """The bytes of memory behind the tensors of a state."""
    return sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(state["slots"]))
