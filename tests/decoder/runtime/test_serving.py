"""generate of models whose rewrites keep no KV cache: what transformers' own loop gives without a cache."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

import gatecc
from gatecc.decoder.runtime import serving
from gatecc.decoder.runtime.served import ServedState
from gatecc.errors import ArgumentError, CallNotCapturedError

GREEDY: dict[str, Any] = {"max_new_tokens": 7, "do_sample": False}
IDS = torch.randint(3, 97, (2, 9), generator=torch.Generator().manual_seed(0))


def llama() -> Any:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    return hf.LlamaForCausalLM(config).eval()


def random(model: Any, rewritten: Any) -> Any:
    """The rewritten model with other values in its new parameters, so that it does not compute what the model does."""
    known = {n for n, _ in model.named_parameters()}
    with torch.no_grad():
        for name, p in rewritten.named_parameters():
            if name not in known:
                p.normal_(std=0.5)
    return rewritten


@pytest.fixture(scope="module")
def plain() -> Any:
    return llama()


@pytest.fixture(scope="module")
def converted(plain: Any) -> Any:
    return random(plain, gatecc.transform(plain, "gla", (IDS,), verify=False))


@pytest.fixture(scope="module")
def gated(plain: Any) -> Any:
    """Gates that no Python call shows: padded calls are right with and without a cache."""
    return random(plain, gatecc.transform(plain, "residual-gates", (IDS,), verify=False))


class Calls:
    """How the model itself is called while it generates: the lengths that it is given."""

    def __init__(self, model: nn.Module) -> None:
        self.lengths: list[int] = []
        self.handle = model.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self.lengths.append(kwargs["input_ids"].shape[1])


def test_tokens_of_a_decoder_and_of_calls_without_a_cache(converted: Any, plain: Any) -> None:
    want = converted.generate(IDS, use_cache=False, **GREEDY)
    assert not torch.equal(want, plain.generate(IDS, **GREEDY))
    assert torch.equal(converted.generate(IDS, **GREEDY), want)
    seen = Calls(converted)
    assert torch.equal(converted.generate(IDS, **GREEDY), want)  # nothing is left of the first
    seen.handle.remove()
    assert seen.lengths == [9, *[1] * 6], "one token at a time"
    assert torch.equal(gatecc.decoder(converted, (IDS,)).generate(IDS, 7), want)
    alone = converted.generate(IDS[:1, :4], **GREEDY)
    assert torch.equal(alone, converted.generate(IDS[:1, :4], use_cache=False, **GREEDY))


LOOPS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "processors": {"repetition_penalty": 1.7, "no_repeat_ngram_size": 2, "bad_words_ids": [[5], [9, 11]]},
    "lengths": {"max_new_tokens": None, "max_length": 13, "min_length": 11},
    "end": {"eos_token_id": list(range(3, 60)), "pad_token_id": 0, "min_new_tokens": 2},
    "chunks": {"prefill_chunk_size": 4},
    "static": {"cache_implementation": "static"},
    "criteria": {"stopping_criteria": [lambda ids, scores: torch.full((len(ids),), ids.shape[1] > 11)]},
}


@pytest.mark.parametrize("name", LOOPS)
def test_the_loop_is_that_of_transformers(converted: Any, name: str) -> None:
    options = {**GREEDY, **LOOPS[name]}
    bare = {**options, "use_cache": False, "prefill_chunk_size": None, "cache_implementation": None}
    assert torch.equal(converted.generate(IDS, **options), converted.generate(IDS, **bare))


def test_samples_scores_and_streams(converted: Any) -> None:
    results: list[Any] = []
    for use_cache in (True, False):
        torch.manual_seed(3)
        results.append(
            converted.generate(
                IDS, max_new_tokens=5, do_sample=True, temperature=0.7, top_k=20, top_p=0.9, num_return_sequences=2,
                use_cache=use_cache, return_dict_in_generate=True, output_scores=True, output_logits=True,
            )
        )  # fmt: skip
    assert torch.equal(results[0].sequences, results[1].sequences)
    torch.testing.assert_close(results[0].logits, results[1].logits, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(results[0].scores, results[1].scores, atol=1e-4, rtol=1e-4)

    class Streamer:
        def __init__(self) -> None:
            self.got: list[torch.Tensor] = []

        def put(self, value: torch.Tensor) -> None:
            self.got.append(value.reshape(-1))

        def end(self) -> None:
            pass

    streamer = Streamer()
    text = converted.generate(IDS[:1], streamer=streamer, **GREEDY)
    assert torch.equal(torch.cat(streamer.got), text[0])


def test_left_padding(gated: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    want = gated.generate(IDS, attention_mask=mask, use_cache=False, **GREEDY)
    assert torch.equal(gated.generate(IDS, attention_mask=mask, **GREEDY), want)
    beams = {**GREEDY, "num_beams": 2, "attention_mask": mask}
    assert torch.equal(gated.generate(IDS, **beams), gated.generate(IDS, use_cache=False, **beams))


def test_a_text_goes_on_from_what_was_returned(converted: Any) -> None:
    first = converted.generate(IDS, return_dict_in_generate=True, **GREEDY)
    branch = copy.deepcopy(first.cache)
    longer = converted.generate(first.sequences, cache=first.cache, **GREEDY)
    want = converted.generate(first.sequences, use_cache=False, **GREEDY)
    assert torch.equal(longer, want)
    assert torch.equal(converted.generate(first.sequences, cache=branch, **GREEDY), want), "a copy is a branch"
    with pytest.raises(ArgumentError, match="goes on with tokens alone"):
        converted(inputs_embeds=torch.zeros(2, 1, 32), cache=branch)


def test_copies_pickles_and_weights_that_change(converted: Any, plain: Any) -> None:
    twin = copy.deepcopy(converted)
    with torch.no_grad():
        twin.model.layers[0].mlp.down_proj.weight.normal_()
    want = twin.generate(IDS, use_cache=False, **GREEDY)
    assert torch.equal(twin.generate(IDS, **GREEDY), want)
    assert not torch.equal(want, converted.generate(IDS, **GREEDY))
    back = pickle.loads(pickle.dumps(twin)).double()
    assert torch.equal(back.generate(IDS, **GREEDY), back.generate(IDS, use_cache=False, **GREEDY))
    loaded: Any = gatecc.revert(back)
    assert type(loaded) is hf.LlamaForCausalLM
    assert not hasattr(loaded, serving.KEPT)
    assert torch.equal(loaded.state_dict()["lm_head.weight"], plain.lm_head.weight)


def test_saved_and_loaded(converted: Any, plain: Any, tmp_path: Any) -> None:
    gatecc.save(converted, tmp_path)
    loaded: Any = gatecc.load(plain, tmp_path)
    assert serving.is_served(loaded)
    assert torch.equal(loaded(IDS).logits, converted(IDS).logits)


def test_what_a_decoder_does_not_show_comes_from_the_model(converted: Any) -> None:
    options = {**GREEDY, "return_dict_in_generate": True, "output_hidden_states": True}
    seen = Calls(converted)
    found = converted.generate(IDS, **options)
    seen.handle.remove()
    assert seen.lengths == [*range(9, 16)]
    assert len(found.hidden_states) == 7
    assert torch.equal(found.sequences, converted.generate(IDS, **GREEDY))


def test_a_model_without_a_decoder_runs_without_a_cache(converted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any) -> None:
        raise gatecc.GateccError("no step")

    twin = copy.deepcopy(converted)
    monkeypatch.setattr(serving, "decoder", refused)
    for more in ({}, {"num_beams": 2}, {"prefill_chunk_size": 3}):
        want = converted.generate(IDS, **{**GREEDY, **more})
        assert torch.equal(twin.generate(IDS, **{**GREEDY, **more}), want)


def test_what_cannot_be_done_is_refused_by_name(converted: Any, plain: Any) -> None:
    with pytest.raises(CallNotCapturedError, match="assisted"):
        converted.generate(IDS[:1], prompt_lookup_num_tokens=2, **GREEDY)
    with pytest.raises(CallNotCapturedError, match="embeddings"):
        converted.generate(inputs_embeds=torch.zeros(1, 3, 32), **GREEDY)
    with pytest.raises(CallNotCapturedError, match="cropped"):
        ServedState(gatecc.decoder(plain, (IDS,))).crop(3)


def test_caches_are_off_while_they_cannot_be_served_and_then_as_they_were() -> None:
    model = llama()
    config = model.config
    once: Any = gatecc.transform(model, "gla", (IDS,), inplace=True, verify=False)
    assert once.config.use_cache is False
    assert once(IDS).logits.shape == (2, 9, 97)
    with pytest.raises(gatecc.GateccError):  # no such site: the model is as it was
        gatecc.transform(once, gatecc.recipe("gated-attention", sites="encoder.*"), (IDS,), inplace=True)
    assert serving.is_served(once)
    back: Any = gatecc.revert(once, inplace=True)
    assert back is model
    assert model.config is config
    assert config.use_cache is True
    assert type(model) is hf.LlamaForCausalLM
    assert torch.equal(back.generate(IDS, **GREEDY), llama().generate(IDS, **GREEDY))
