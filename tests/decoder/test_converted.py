"""A converted model decodes by the states of its mixers; transformers give layers masks that alone prove nothing."""

from __future__ import annotations

from typing import Any

import torch

import gatecc


def test_a_hybrid_of_linear_and_softmax_layers_decodes_step_by_step() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape: dict[str, Any] = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    llama = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, num_key_value_heads=1)).eval()
    ids = torch.randint(0, 32, (2, 9))
    recipe = gatecc.recipe("gla", keep="1", feature="hedgehog", rope=True, normalize=True, norm=False, gate=False)
    model: Any = gatecc.transform(llama, recipe, {"input_ids": ids})
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
