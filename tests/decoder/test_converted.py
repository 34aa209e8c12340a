"""A converted model decodes by the states of its mixers; transformers give layers masks that alone prove nothing."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils import _pytree as pytree

import gatecc
from gatecc.decoder import Decoder
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
    model: Any = gatecc.transform(llama(2), recipe, {"input_ids": ids}, verify=False)
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
    model: Any = gatecc.transform(llama(1), recipe, {"input_ids": ids}, verify=False)
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


class Attending(nn.Module):
    """Causal attention of two heads that share a key head, over tokens that are no padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.q, self.k, self.v, self.o = (nn.Linear(D, width) for width in (D, D // 2, D // 2, D))

    def forward(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> torch.Tensor:
        """ids, attention_mask: (B, N) -> (B, N, V)"""
        x = self.embed(ids)
        q, k, v = (y(x).unflatten(-1, (-1, D // 2)).transpose(1, 2) for y in (self.q, self.k, self.v))
        k, v = (y.repeat_interleave(2, 1) for y in (k, v))
        seen = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool).tril()
        if attention_mask is not None:
            seen = (seen & attention_mask.bool()[:, None, None]) | torch.eye(ids.shape[1], dtype=torch.bool)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


@pytest.fixture(scope="module")
def lolcats() -> tuple[Any, Decoder]:
    """LoLCATs whose learned weights are no longer those of the start."""
    inputs = torch.randint(0, V, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    torch.manual_seed(0)
    model: Any = gatecc.transform(
        Attending().eval(), gatecc.recipe("lolcats", window=4), inputs, scope="model", verify=False
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer" in name:
                parameter.normal_()
    return model, gatecc.decoder(model, inputs)


class Outputs(nn.Module):
    """The outputs of a recurrent layer, without its last state."""

    def __init__(self, layer: nn.RNNBase) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)[0]


def test_lolcats_decodes(lolcats: tuple[Any, Decoder]) -> None:
    model, made = lolcats
    assert [slot.kind for slot in made.plan.slots] == ["keys", "keys", "taps", "taps", "state"]
    decodes(made, lambda ids: full(model, ids, torch.ones_like(ids)))


def test_left_padding_is_hidden_from_windows_and_from_states(lolcats: tuple[Any, Decoder]) -> None:
    model, made = lolcats
    ids, mask = torch.randint(0, V, (2, 16)), torch.ones(2, 16, dtype=torch.long)
    mask[0, :6] = 0
    expected, seen = full(model, ids, mask), mask.bool()
    assert difference(expected[seen], stepped(made, ids, PIECES, attention_mask=mask)[seen]) <= 1e-5
    alone, _ = made.prefill(ids[:1, 6:])
    assert difference(expected[:1, 6:], alone) <= 1e-5
    together = made.generate(ids, 4, attention_mask=mask)
    assert torch.equal(together[:1, 6:], made.generate(ids[:1, 6:], 4))


def test_pgn_decodes() -> None:
    """Two GRU layers that were converted, and an LSTM that was not."""
    ids = torch.randint(V, (2, 16))
    torch.manual_seed(0)
    plain = Mixed(nn.Sequential(Outputs(nn.GRU(D, D, 2, batch_first=True)), Outputs(nn.LSTM(D, D, batch_first=True))))
    recipe = gatecc.recipe("pgn", window=4, keep="mixer.1.layer")
    model: Any = gatecc.transform(plain.eval(), recipe, (ids,), scope="model", verify=False)
    made = gatecc.decoder(model, (ids,))
    assert [slot.kind for slot in made.plan.slots] == ["taps", "taps", "state", "state"]
    decodes(made, lambda ids: full(model, ids))


def decodes(made: Decoder, forward: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Steps, a text that goes on from a saved state, and what is generated are the full forward; states do not grow."""
    ids = torch.randint(V, (2, 16))
    expected = forward(ids)
    assert difference(expected, stepped(made, ids)) <= 1e-5
    _, state = made.prefill(ids[:, :7])
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    logits, _ = made.prefill(ids[:, 7:], torch.load(file))
    assert difference(expected[:, 7:], logits) <= 1e-5
    text = ids[:, :9]
    for _ in range(5):
        text = torch.cat([text, forward(text)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made.generate(ids[:, :9], 5), text)
    sizes = [held(made.prefill(ids.repeat(1, times))[1]) for times in (1, 4)]
    assert sizes[0] == sizes[1], "the state does not grow with the length"


def held(state: Any) -> int:
    """The bytes of memory behind the tensors of a state."""
    return sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(state["slots"]))
