"""gatecc.onnx.Session: a folder generates what the model's derived decoder does."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, CheckpointError, MissingPackageError
from gatecc.export.carried import size_of
from gatecc.onnx import Session

pytest.importorskip("onnxruntime")
VOCABULARY = 97


@dataclass(frozen=True)
class Case:
    """A model with a folder that holds it, and prompts."""

    model: nn.Module
    inputs: Any
    folder: Path
    ids: Tensor


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One layer of softmax attention and one of linear attention, for prompts that are padded on the left."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    ids = torch.randint(VOCABULARY, (2, 9))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    model = transformers.LlamaForCausalLM(config).eval()
    model = gatecc.transform(model, gatecc.recipe("gla", sites="attention[1]"), inputs)
    folder = tmp_path_factory.mktemp("session") / "model"
    gatecc.export(model, folder, inputs, decode=True)
    return Case(model, inputs, folder, ids)


def test_generates_what_the_decoder_does(case: Case) -> None:
    session, decoder = Session(case.folder), gatecc.decoder(case.model, case.inputs)
    mask = torch.ones_like(case.ids)
    mask[0, :4] = 0
    options: list[dict[str, Any]] = [{}, {"temperature": 0.8, "top_k": 30, "top_p": 0.9, "stop": 3}]
    for option in options:
        texts: list[Tensor] = []
        for runner in (session, decoder):
            generator = torch.Generator().manual_seed(1) if option else None
            texts.append(runner.generate(case.ids, 12, attention_mask=mask, generator=generator, **option))
        assert torch.equal(*texts)
    streamed: list[Tensor] = []
    text = session.generate(case.ids, 5, stream=streamed.append)
    assert torch.equal(torch.stack(streamed, 1), text[:, 9:])


def test_keys_stay_in_one_buffer_and_prompts_are_padded_on_either_side(tmp_path: Path) -> None:
    """Softmax layers alone, captured without a mask: GroupQueryAttention counts the tokens of each row."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model, ids = transformers.LlamaForCausalLM(config).eval(), torch.randint(VOCABULARY, (3, 9))
    made = gatecc.export(model, tmp_path / "x", (ids,), decode=True).decode
    assert made is not None
    assert made.operators["com.microsoft::GroupQueryAttention"] == 1
    assert (made.padding, made.singly, [s.shared for s in made.states]) == ("right", True, [True, True])
    session, decoder = Session(tmp_path / "x"), gatecc.decoder(model, (ids,))
    assert torch.equal(session.generate(ids, 80), decoder.generate(ids, 80))  # beyond the first buffer
    for side in (slice(0, 4), slice(5, 9)):
        mask = torch.ones_like(ids)
        mask[0, side] = 0
        logits, state = session.prefill(ids, attention_mask=mask)
        alone = decoder.prefill(ids[:1, mask[0].bool()])[0]
        torch.testing.assert_close(logits[:1, mask[0].bool()], alone, rtol=0, atol=1e-5)
        with pytest.raises(ArgumentError, match="only a whole prompt may be padded"):
            session.step(ids[:, :2], state, attention_mask=mask[:, 3:5] * 0)
    _, state = session.prefill(ids)
    one, _ = session.step(ids[:, 0], state)
    session.step(ids[:, 1], state)  # another branch of the same state
    chunk, _ = session.step(ids[:, :3], state)  # token by token, for the node takes no chunk of several samples
    torch.testing.assert_close(chunk[:, 0], one, rtol=0, atol=1e-5)


def test_states_are_kept_and_stay_as_they_are(case: Case) -> None:
    session = Session(case.folder, providers=["CPUExecutionProvider"])
    whole, _ = session.prefill(case.ids)
    session.reset()
    with pytest.raises(ArgumentError, match="no text to continue"):
        session.step(case.ids[:, 0])
    _, first = session.prefill(case.ids[:, :6])
    one, _ = session.step(case.ids[:, 6])  # goes on from the state that the session keeps
    chunk, _ = session.step(case.ids[:, 7:])
    torch.testing.assert_close(torch.cat([one.unsqueeze(1), chunk], 1), whole[:, 6:], rtol=0, atol=1e-5)
    again, _ = session.step(case.ids[:, 6], first)  # a branch from an earlier state
    assert torch.equal(again, one)


def test_what_does_not_fit_is_said(case: Case) -> None:
    session = Session(case.folder)
    _, state = session.prefill(case.ids)
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("whole numbers", (case.ids.float(),), {}),
        ("no tokens", (case.ids[:, :0],), {}),
        ("another batch", (case.ids[:1], state), {}),
        ("positions for 64 tokens", (case.ids.repeat(1, 8),), {}),
        ("without this input", (case.ids,), {"token_type_ids": case.ids}),
        ("another shape", (case.ids,), {"attention_mask": case.ids[:, :3]}),
        ("cannot run these tokens", (case.ids + VOCABULARY,), {}),
    ]
    for message, args, values in wrong:
        with pytest.raises(ArgumentError, match=message):
            session.prefill(*args, **values)
    with pytest.raises(ArgumentError, match="does not have the provider"):
        Session(case.folder, providers=["TensorrtExecutionProvider"])


def test_files_that_were_changed_are_not_run(case: Case, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no gatecc.json"):
        Session(tmp_path)
    shutil.copytree(case.folder, tmp_path / "changed")
    with (tmp_path / "changed" / "decode.onnx").open("ab") as file:
        file.write(b"\x00")
    with pytest.raises(CheckpointError, match="not the one that was exported"):
        Session(tmp_path / "changed")
    (tmp_path / "changed" / "decode.onnx").unlink()
    with pytest.raises(CheckpointError, match="missing"):
        Session(tmp_path / "changed")
    manifest = tmp_path / "changed" / "gatecc.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "decode": None}))
    with pytest.raises(CheckpointError, match=r"no decode.onnx"):
        Session(tmp_path / "changed")


def test_two_builds_of_the_runtime_are_refused(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    real = metadata.version
    monkeypatch.setattr("gatecc.onnx.version", lambda name: "1.0" if name.startswith("onnxruntime") else real(name))
    with pytest.raises(MissingPackageError, match="both builds"):
        Session(case.folder)


def test_sizes_of_a_manifest_are_arithmetic() -> None:
    assert [size_of(size, 3) for size in (4, "batch", "2*batch", "batch + 1", "7")] == [4, 3, 6, 4, 7]
    with pytest.raises(CheckpointError, match="no arithmetic"):
        size_of("__import__('os').getcwd()", 3)
