"""Generation: greedy as transformers does it, sampled, stopped, streamed, from prompts of several lengths."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import gatecc
from gatecc.decoder import Decoder
from gatecc.decoder.runtime.generate import choose
from gatecc.errors import ArgumentError
from tests.zoo import SPECS
from tests.zoo.spec import padding, tokens


@pytest.fixture(scope="module")
def llama() -> tuple[Any, Decoder]:
    case = SPECS["hf/llama_padded-sdpa"].build()
    model: Any = case.model
    model.generation_config.eos_token_id = None
    mask = torch.ones(2, 16, dtype=torch.long)
    positions = torch.arange(16).expand(2, 16).contiguous()
    ids = {"input_ids": tokens(2, 16), "attention_mask": mask, "position_ids": positions}
    return model, gatecc.decoder(model, ids)


def test_greedy_is_what_transformers_generates(llama: tuple[Any, Decoder]) -> None:
    model, made = llama
    ids = tokens(3, 9)
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
    assert torch.equal(made.generate(ids, 12), expected)


def test_prompts_of_several_lengths_are_padded_on_either_side(llama: tuple[Any, Decoder]) -> None:
    model, made = llama
    ids, mask = tokens(3, 9), padding(3, 9, left=True).long()
    together = made.generate(ids, 12, attention_mask=mask)
    assert torch.equal(together, model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False))
    for row, kept in zip(together, mask, strict=True):
        alone = made.generate(row[:9][kept.bool()][None], 12)
        assert torch.equal(alone[0, -12:], row[-12:])
    moved = [torch.cat([row[kept.bool()], row[~kept.bool()]]) for row, kept in zip(ids, mask, strict=True)]
    behind = made.generate(torch.stack(moved), 12, attention_mask=mask.flip(1))
    assert torch.equal(behind[:, -12:], together[:, -12:])


def test_samples_stop_one_by_one(llama: tuple[Any, Decoder]) -> None:
    _, made = llama
    ids = tokens(3, 9)
    free = made.generate(ids, 12)[:, 9:]
    stop = int(free[0, 3])
    seen: list[Tensor] = []
    new = made.generate(ids, 12, stop=stop, stream=seen.append)[:, 9:]
    assert torch.equal(torch.stack(seen, 1), new)
    for row, whole in zip(new.tolist(), free.tolist(), strict=True):
        end = whole.index(stop) if stop in whole else len(whole)
        assert row[: end + 1] == whole[: min(end + 1, len(row))]
        assert set(row[end:]) <= {stop}


def test_sampling_is_drawn_from_the_generator(llama: tuple[Any, Decoder]) -> None:
    _, made = llama
    ids = tokens(2, 9)
    runs = [
        made.generate(ids, 8, temperature=1.0, top_k=20, top_p=0.9, generator=torch.Generator().manual_seed(s))
        for s in (1, 1, 2)
    ]
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
    assert torch.equal(made.generate(ids, 8, temperature=1.0, top_k=1), made.generate(ids, 8))


def test_sampled_frequencies_are_those_of_the_truncated_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]]).expand(20000, 5)
    generator = torch.Generator().manual_seed(0)
    drawn = choose(logits, 2.0, 4, 0.8, generator).bincount(minlength=5) / 20000
    p = (logits[0, :4] / 2).softmax(-1)
    p = p[:3] / p[:3].sum()  # 0.44 + 0.27 < 0.8: the third is needed to reach it
    assert torch.allclose(drawn[:3], p, atol=0.02)
    assert not drawn[3:].any()


def test_options_out_of_range_are_refused(llama: tuple[Any, Decoder]) -> None:
    _, made = llama
    ids = tokens(2, 9)
    wrong: list[dict[str, Any]] = [
        {"temperature": -1.0},
        {"temperature": 1.0, "top_p": 0.0},
        {"top_k": 3},
        {"token_types": ids},
    ]
    for options in wrong:
        with pytest.raises(ArgumentError):
            made.generate(ids, 4, **options)
    assert torch.equal(made.generate(ids, 0), ids)
