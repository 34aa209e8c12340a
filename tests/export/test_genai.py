"""onnxruntime-genai generates from an exported folder what torch does, and the manifest says what it cannot do."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

import gatecc
from gatecc.export.carried import Carried
from gatecc.export.decode import Decode
from gatecc.export.genai import dummies, unfit

og: Any = pytest.importorskip("onnxruntime_genai")
VOCABULARY, PROMPT, NEW = 97, 9, 12
IDS = torch.randint(1, VOCABULARY, (2, PROMPT), generator=torch.Generator().manual_seed(0))


@dataclass(frozen=True)
class Folder:
    """An export with the model that it is of."""

    model: Any
    path: Path
    decode: Decode


SCALED = {"rope_type": "llama3", "rope_theta": 100.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def plain(layers: int = 1, **options: Any) -> nn.Module:
    """Its weights are large enough that each token of a prompt changes the next one. It never says token 0."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.4,
        eos_token_id=VOCABULARY + 3,  # of another tokenizer: no token of this one
        **options,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    nn.init.zeros_(model.lm_head.weight.detach()[0])
    return model


def mixed() -> nn.Module:
    """A layer of softmax attention with a gate and one of gated linear attention, with rotary embeddings that are
    scaled for longer texts, as those of Llama 3.1 are."""
    scaled = plain(2, rope_parameters={**SCALED, "original_max_position_embeddings": 16})
    softmax, linear = gatecc.recipe("gated-attention", sites="attention[0]"), gatecc.recipe("gla", sites="attention[1]")
    model = gatecc.transform(scaled, [*softmax.rewrites, *linear.rewrites], {**TOKENS, **MASK}, verify=False)
    for name, weight in model.named_parameters():
        if "gate." in name:
            nn.init.normal_(weight, std=0.5)
    return model


TOKENS, MASK = {"input_ids": IDS}, {"attention_mask": torch.ones_like(IDS)}


FORMS = {"plain": (plain, TOKENS, None), "mixed": (mixed, {**TOKENS, **MASK}, None), "fp16": (plain, TOKENS, "fp16")}


@pytest.fixture(scope="module", params=FORMS.values(), ids=list(FORMS))
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """Without and with a mask among the example inputs, and in fewer bits."""
    make: Callable[[], nn.Module] = request.param[0]
    model, path = make(), tmp_path_factory.mktemp(make.__name__) / "out"
    made = gatecc.export(model, path, request.param[1], decode=True, quantize=request.param[2])
    assert made.decode is not None
    assert made.decode.operators["com.microsoft::GroupQueryAttention"] == 1
    assert "positions reach to 64 tokens" in " ".join(made.notes)
    return Folder(model, path, made.decode)


def by_genai(path: Path, ids: Tensor) -> Tensor:
    """Greedy tokens behind prompts. (B, N) -> (B, NEW)"""
    runner = og.Model(str(path))
    options = og.GeneratorParams(runner)
    options.set_search_options(do_sample=False, max_length=ids.shape[1] + NEW, batch_size=len(ids))
    generator = og.Generator(runner, options)
    generator.append_tokens(ids.numpy().astype(np.int32))
    for _ in range(NEW):
        generator.generate_next_token()
    found = [list(map(int, generator.get_sequence(row)))[ids.shape[1] :] for row in range(len(ids))]
    return torch.tensor(found)


def by_torch(model: Any, ids: Tensor) -> Tensor:
    """The same by full forwards, without any cache."""
    text = ids
    with torch.no_grad():
        for _ in range(NEW):
            text = torch.cat([text, model(text).logits[:, -1:].argmax(-1)], 1)
    return text[:, ids.shape[1] :]


def test_greedy_tokens_are_those_of_torch(folder: Folder) -> None:
    for ids in (IDS[:1], IDS):
        assert torch.equal(by_genai(folder.path, ids), by_torch(folder.model, ids))
    told, layers = folder.decode.genai, {s.layer for s in folder.decode.states if s.kind == "state"}
    assert (told.refused, told.padding) == ("", "right")
    assert any("beam search" in limit for limit in told.limits) == bool(layers)
    assert any("eos_token_id 100" in limit for limit in told.limits)
    config = json.loads((folder.path / "genai_config.json").read_text())
    shared = all(s.shared for s in folder.decode.states if s.kind == "keys")
    assert (config["model"]["eos_token_id"], config["search"]["past_present_share_buffer"]) == (0, shared)
    assert {s.layer for s in folder.decode.states if s.kind == "dummy"} == layers


def test_prompts_of_several_lengths(folder: Folder) -> None:
    """Linear attention passes over padding by the mask that the model takes, softmax attention by counting tokens."""
    padded = IDS.clone()
    padded[1, 5:] = -1
    found = by_genai(folder.path, padded)
    assert torch.equal(found[:1], by_torch(folder.model, IDS[:1]))
    assert torch.equal(found[1:], by_torch(folder.model, IDS[1:, :5]))


def test_states_that_it_has_no_place_for_are_refused() -> None:
    keys = Carried(
        "past_key_values.0.key", "present.0.key", "keys", 0, ["batch", 2, "past", 4], "float32", 2, 0.0, True
    )
    state = Carried(
        "past.1.recurrent", "present.1.recurrent", "state", 1, ["batch", 2, 4, 4], "float32", None, 0.0, False
    )
    taps = replace(state, input="past.2.conv", output="present.2.conv", kind="taps", layer=2, shape=["batch", 8, 3])
    logits = ["batch", "sequence", 97]
    assert unfit([keys, state, taps], ["position_ids"], logits) == ""
    added = dummies([keys, state, taps])
    assert [(d.input, d.shape) for d in added] == [
        ("past.1.conv", ["batch", 8, 3]),
        ("past.2.recurrent", ["batch", 2, 4, 4]),
    ]
    assert [d.shape for d in dummies([keys, state])] == [["batch", 1]]
    refused: list[tuple[Carried, str]] = [
        (replace(state, input="past.1.sum", kind="scan"), "one recurrent and one conv"),
        (replace(state, input="past.1.recurrent_1"), "one recurrent and one conv"),
        (replace(state, dtype="float64"), "float32 or float16"),
        (replace(state, fill=-1.0), "begin with zeros"),
        (replace(state, shape=[1, "batch", 8]), "first axis"),
        (replace(state, shape=["batch", "past", 8]), "stays a number"),
        (replace(taps, shape=["batch", 8, 3, 1]), "3 axes"),
        (replace(keys, grows=1), "third axis"),
        (replace(taps, shape=["batch", 9, 3]), "one shape of conv"),
    ]
    for wrong, reason in refused:
        assert reason in unfit([keys, state, taps, wrong], (), logits)
    assert "token_type_ids" in unfit([keys], ["token_type_ids"], logits)
    assert "vocabulary" in unfit([keys], (), ["batch", 97])
