"""A converted model decodes by the states of its mixers; transformers give layers masks that alone prove nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import gatecc
from tests.decoder.stepping import difference, full, stepped


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


def held(state: Any) -> int:
    """The bytes of memory behind the tensors of a state."""
    return sum(x.untyped_storage().nbytes() for x in pytree.tree_leaves(state["slots"]))
