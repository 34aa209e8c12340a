"""decode.onnx of models that read a text or sounds first: the encoder runs once, in a file of its own."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError
from gatecc.onnx import Session
from tests.decoder.runtime.test_context import Conditioned

pytest.importorskip("onnxruntime")
V, START = 60, 2
LAYERS: dict[str, Any] = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
HEADS: dict[str, Any] = {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "d_model": 16, "vocab_size": V}
SPECIAL: dict[str, Any] = {"pad_token_id": 1, "decoder_start_token_id": START, "eos_token_id": V - 1}


class Translator(nn.Module):
    """A layer that reads a text with padding, and one of attention to what was said and to what was read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, 32), nn.Linear(32, V)
        self.read, self.said, self.ask = nn.Linear(32, 96), nn.Linear(32, 96), nn.Linear(32, 32)
        self.memory, self.mix = nn.Linear(32, 64), nn.Linear(32, 32)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, decoder_input_ids: Tensor) -> Tensor:
        """(B, M), (B, M), (B, N) -> (B, N, V)"""
        attend, seen = nn.functional.scaled_dot_product_attention, attention_mask[:, None, None].bool()
        x, y = self.embed(input_ids), self.embed(decoder_input_ids)
        q, k, v = heads(self.read(x))
        x = x + self.mix(merged(attend(q, k, v, seen)))
        q, k, v = heads(self.said(y))
        y = y + merged(attend(q, k, v, is_causal=True))
        (query,), (keys, values) = heads(self.ask(y)), heads(self.memory(x))
        return self.head(y + merged(attend(query, keys, values, seen)))


def heads(x: Tensor) -> list[Tensor]:
    """(B, N, 32 parts) -> (B, 2, N, 16) each"""
    return [part.unflatten(-1, (2, 16)).transpose(1, 2) for part in x.split(32, -1)]


def merged(x: Tensor) -> Tensor:
    """(B, 2, N, 16) -> (B, N, 32)"""
    return x.transpose(1, 2).flatten(2)


def translator() -> nn.Module:
    """Written by hand: all that an encoder and a decoder have."""
    return Translator().eval()


def bart() -> nn.Module:
    """Learned positions, attention that becomes GroupQueryAttention."""
    config = transformers.BartConfig(**LAYERS, **HEADS, **SPECIAL, max_position_embeddings=128)
    return transformers.BartForConditionalGeneration(config).eval()


def t5() -> nn.Module:
    """Positions that are added to the scores."""
    special: dict[str, Any] = {**SPECIAL, "pad_token_id": 0}
    config = transformers.T5Config(vocab_size=V, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, **special)
    return transformers.T5ForConditionalGeneration(config).eval()


def whisper() -> nn.Module:
    """Features of a fixed length, through convolutions."""
    config = transformers.WhisperConfig(
        **LAYERS, **HEADS, **SPECIAL, max_source_positions=10, max_target_positions=40, num_mel_bins=4, bos_token_id=3
    )
    return transformers.WhisperForConditionalGeneration(config).eval()


def greedy(model: nn.Module, context: dict[str, Tensor], ids: Tensor, count: int) -> Tensor:
    """By full forwards."""
    with torch.no_grad():
        for _ in range(count):
            out = model(**context, decoder_input_ids=ids)
            best = (out if isinstance(out, Tensor) else out.logits)[:, -1].argmax(-1)
            ids = torch.cat([ids, best[:, None]], 1)
    return ids


@pytest.mark.parametrize("build", [translator, *([bart, t5, whisper] if os.getenv("GATECC_ZOO") == "all" else [])])
def test_generates_what_full_forwards_do(build: Any, tmp_path: Path) -> None:
    """Of texts of another number, another length, padded on both sides."""
    torch.manual_seed(0)
    model, start = build(), torch.full((2, 1), START)
    inputs: dict[str, Any]
    context: dict[str, Any]
    if build is whisper:
        inputs, context = {"input_features": torch.randn(2, 4, 20)}, {"input_features": torch.randn(3, 4, 20)}
    else:
        ids, mask = torch.randint(3, V, (3, 13)), torch.ones(3, 13, dtype=torch.long)
        mask[0, :4], mask[1, 8:] = 0, 0
        inputs = {"input_ids": ids[:2, :9], "attention_mask": torch.ones_like(ids[:2, :9])}
        context = {"input_ids": ids, "attention_mask": mask}
    made = gatecc.export(model, tmp_path / "x", {**inputs, "decoder_input_ids": start}, decode=True)
    assert made.decode is not None
    assert made.decode.encoder is not None
    assert set(made.decode.encoder.inputs) == set(inputs)
    assert {"past_key_values.0.encoder.key", "past_key_values.0.encoder.value"} <= set(made.decode.encoder.outputs)
    assert {"model.onnx", "decode.onnx", "encoder.onnx"} <= set(made.files)
    session = Session(tmp_path / "x")
    begin = torch.full((3, 1), START)
    assert torch.equal(session.generate(begin, 12, **context), greedy(model, context, begin, 12))
    _, state = session.prefill(begin, **context)
    with pytest.raises(ArgumentError, match="given with its first tokens"):
        session.step(begin, state, **context)
    with pytest.raises(ArgumentError, match="not what the model was exported with"):
        session.prefill(begin)
    with pytest.raises(ArgumentError, match="not of the shape that was exported"):
        session.prefill(begin[:2], None, **context)


def test_features_of_a_fixed_size(tmp_path: Path) -> None:
    """No encoder of tokens, and no attention to it: what is projected once is a file of its own as well."""
    ids, features = torch.randint(20, (3, 9)), torch.randn(3, 6)
    model = Conditioned().eval()
    made = gatecc.export(model, tmp_path / "x", {"ids": ids, "features": features}, decode=True).decode
    assert made is not None
    assert made.encoder is not None
    assert list(made.encoder.outputs.values()) == [["batch", 1, 8]]
    logits, _ = Session(tmp_path / "x").prefill(ids, features=features)
    torch.testing.assert_close(logits, model(ids, features).detach(), rtol=0, atol=1e-5)


def test_both_files_in_fewer_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is measured, the steps behind the encoder of the same folder."""
    monkeypatch.setattr(sys.modules["gatecc.export.quantize"], "_SLOWER", 100)  # a tiny one may be, on AVX2 it is
    torch.manual_seed(0)
    model, ids, said = translator(), torch.randint(3, V, (2, 9)), torch.randint(3, V, (2, 6))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "decoder_input_ids": said}
    made = gatecc.export(model, tmp_path / "x", inputs, decode=True, quantize="w8", evaluation_inputs=[inputs])
    told, session = made.quantized, Session(tmp_path / "x")
    assert told is not None
    assert told.encoder is not None
    assert told.decode is not None
    assert told.decode.accuracy is not None
    assert [told.encoder.operators["com.microsoft::MatMulNBits"], len(told.encoder.accuracy)] == [3, 2]
    assert made.decode is not None
    assert made.decode.encoder is not None
    assert made.decode.encoder.operators == told.encoder.operators
    assert [list(told.encoder.time), list(told.decode.time)] == [["(2, 9), (2, 9)"], ["a step behind 64 tokens"]]
    logits, expected = (
        session.prefill(said, input_ids=ids, attention_mask=inputs["attention_mask"])[0],
        model(**inputs).detach(),
    )
    error = float((logits - expected).abs().max() / expected.abs().max().clamp(min=1))
    assert 0 < error < 0.05
    assert told.decode.accuracy.error == pytest.approx(error, rel=0.2)
    assert all(0 < a.error < 0.05 for a in told.encoder.accuracy)
