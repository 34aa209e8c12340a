"""The derived decoder is the full forward, on every decoder that transformers builds offline.

A subset by default; GATECC_ZOO=all runs all of them.
"""

from __future__ import annotations

import os

import pytest

import gatecc
from gatecc.decoder.runtime import decoder as runtime
from tests.decoder.stepping import PIECES, difference, full, stepped
from tests.zoo import SPECS, variants
from tests.zoo.huggingface import ENTRIES
from tests.zoo.spec import Spec

DECODERS = {f"hf/{e.name}-{impl}" for e in ENTRIES if e.kind == "decoder" for impl in e.impls}
SUBSET = (
    "hf/llama_padded-sdpa",  # grouped keys, rotary tables, a mask per token
    "hf/mistral-sdpa",  # a sliding window, fused
    "hf/gemma2-eager",  # windows and full attention in turn, soft cap, spelled out
    "hf/gpt2-eager",  # learned positions
    "hf/gpt_oss-eager",  # sinks, windows, experts
    "hf/mpt-eager",  # ALiBi counted from the end: no table holds it
    "hf/deepseek_v3-sdpa",  # keys that are filled in place
)
HAND = ("hand/alibi", "hand/packed")
RUN = DECODERS if os.environ.get("GATECC_ZOO") == "all" else set(SUBSET)


@pytest.mark.parametrize("spec", [pytest.param(s, id=n) for n, s in variants("hf", "hand") if n in RUN | set(HAND)])
def test_steps_are_the_full_forward(spec: Spec) -> None:
    case = spec.build()
    made = gatecc.decoder(case.model, case.inputs)
    ids = case.args[0] if case.args else case.kwargs["input_ids"]
    values = {n.name: x for n, x in zip(made.plan.program.placeholders, made.plan.program.example, strict=True)}
    values = {n.name: values[n.name] for n in made.plan.inputs.history}
    expected, got = full(case.model, *case.args, **case.kwargs), stepped(made, ids, PIECES, **values)
    if "attention_mask" in values:  # what is computed at padding is of no use
        seen = values["attention_mask"].bool()
        expected, got = expected[seen], got[seen]
    assert difference(expected, got) <= 1e-5


@pytest.mark.parametrize("name", ["hand/sdpa_sliding", "hand/sliding"])
def test_masks_too_large_for_a_table_are_evaluated_row_by_row(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "_LARGEST", 0)
    case = SPECS[name].build()
    made = gatecc.decoder(case.model, case.inputs)
    ids = case.args[0]
    assert difference(full(case.model, ids), stepped(made, ids)) <= 1e-5
    assert all(len(made.plan.lengths.axes(node)) < 2 for node in made.tables(single=False))
