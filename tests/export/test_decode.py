"""decode.onnx: prompts and steps of any length give what one full forward of torch gives."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.codegen.onnx import build
from gatecc.errors import DecoderError, ExportError
from gatecc.export import steps
from gatecc.export.encoder import encode_in_torch
from tests.decoder.emit.test_step import MIXERS
from tests.decoder.mixing import D, LinearAttention, Mixed, V
from tests.decoder.rules.test_scan import Convolution

ort = pytest.importorskip("onnxruntime")
IDS = torch.randint(V, (2, 12))


class Several(nn.Module):
    """One mixer behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(MIXERS[name]() for name in ("conv", "mean", "linear attention", "lstm"))

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        for mixer in self.mixers:
            x = x + mixer(x)
        return x


def test_every_kind_of_state(tmp_path: Path) -> None:
    made = gatecc.export(Mixed(Several()).eval(), tmp_path / "x", (IDS,), decode=True).decode
    assert made is not None
    names = ["0.conv", "1.sum", "2.recurrent", "3.recurrent", "3.recurrent_1"]
    assert [(s.input, s.output) for s in made.states] == [(f"past.{n}", f"present.{n}") for n in names]
    compared = {(c.sizes["batch"], c.sizes["prefill"]) for c in made.compared}
    assert compared == {(batch, prefill) for batch in (1, 3) for prefill in (1, 7, 64)}
    assert max(c.error for c in made.compared) < 1e-5
    assert made.operators["com.microsoft::CausalConvWithState"] == 1


def test_a_step_in_operators_of_the_standard(tmp_path: Path) -> None:
    model = Mixed(LinearAttention("gated")).eval()
    made = gatecc.export(model, tmp_path / "x", (IDS,), decode=True, target="portable").decode
    assert made is not None
    assert not [op for op in made.operators if "::" in op]
    assert made.operators["If"] == made.operators["Scan"] == 1  # a token by itself, or chunks
    assert {c.sizes["prefill"] for c in made.compared} == {1, 7, 64}
    text = gatecc.onnx.Session(tmp_path / "x").generate(IDS, 5)
    expected = IDS
    for _ in range(5):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert text.equal(expected)


class Windowed(nn.Module):
    """Attention over a window of 5 with heads that share keys, and positions that are learned."""

    def __init__(self) -> None:
        super().__init__()
        self.places = nn.Embedding(40, D)
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D // 2), nn.Linear(D, D // 2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        at = torch.arange(x.shape[1])
        x = x + self.places(at)
        q, k, v = (f(x).unflatten(-1, (-1, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = (at <= at[:, None]) & (at > at[:, None] - 5)
        y = nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        return y.transpose(1, 2).flatten(2)


def test_a_window_and_a_table_of_positions(tmp_path: Path) -> None:
    exported = gatecc.export(Mixed(Windowed()).eval(), tmp_path / "x", (IDS,), decode=True)
    made = exported.decode
    assert made is not None
    assert "decode.onnx keeps the keys of all tokens, also where windows of [5]" in " ".join(exported.notes)
    assert made.context_length == 40
    key, _ = made.states
    assert key.window == 5
    assert (key.input, key.grows, key.shape) == ("past_key_values.0.key", 2, ["batch", 2, "past_sequence", 4])
    assert {c.sizes["prefill"] for c in made.compared} == {1, 7, 37}


def test_by_hand_with_one_file_of_weights(tmp_path: Path) -> None:
    """Tokens one by one, as somebody runs the files who reads the manifest alone; weights are held once."""
    model = Mixed(Convolution(cut=False)).eval()
    made = gatecc.export(model, tmp_path / "x", (IDS,), decode=True, external_data=True)
    assert sorted(made.files) == ["decode.onnx", "genai_config.json", "model.onnx", "model.onnx.data"]
    large = [w.nbytes for w in model.parameters() if w.nbytes > 1024]
    assert sum(large) <= (tmp_path / "x" / build.DATA).stat().st_size < sum(large) + min(large)
    session = ort.InferenceSession(str(tmp_path / "x" / "decode.onnx"))
    state, unread, parts = torch.zeros(2, D, 3).numpy(), torch.zeros(2, 1).numpy(), []
    assert made.decode is not None
    assert [(s.input, s.kind) for s in made.decode.states[1:]] == [("past.0.recurrent", "dummy")]
    for token in IDS.split(1, 1):
        feeds = {"input_ids": token.numpy(), "past.0.conv": state, "past.0.recurrent": unread}
        logits, state = session.run(["logits", "present.0.conv"], feeds)
        parts.append(torch.from_numpy(logits))
    torch.testing.assert_close(torch.cat(parts, 1), model(IDS).detach(), rtol=0, atol=1e-5)


class Changing(nn.Module):
    """Attention whose scores are clamped, or capped and scaled, behind a weight that is cast to what it is already."""

    def __init__(self, change: str) -> None:
        super().__init__()
        self.change, self.scale = change, nn.Parameter(torch.randn(D))
        self.q, self.k, self.v = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        x = x * self.scale.float()
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        scores = q @ k.mT
        scores = scores.clamp(-1, 1) if self.change == "clamp" else torch.tanh(scores / 2) * 3
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        return (scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("change", ["clamp", "cap"])
def test_scores_that_are_changed(change: str, tmp_path: Path) -> None:
    """No node of attention clamps scores; one caps them, and numbers on both sides of a cap are its scale."""
    model = Mixed(Changing(change)).eval()
    made = gatecc.export(model, tmp_path / "x", (IDS,), decode=True)
    assert made.decode is not None
    fused = "com.microsoft::GroupQueryAttention"
    assert (fused in made.operators) == (fused in made.decode.operators) == (change == "cap")
    assert any("a soft cap and a mask behind it" in why for why in made.kept) == (change == "clamp")
    text, expected = gatecc.onnx.Session(tmp_path / "x").generate(IDS, 5), IDS
    for _ in range(5):
        expected = torch.cat([expected, model(expected)[:, -1:].argmax(-1)], 1)
    assert text.equal(expected)


def test_a_difference_is_an_error_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps.before_first

    def wrong(*args: Any) -> list[Tensor]:
        return [x + 0.1 for x in right(*args)]

    monkeypatch.setattr(steps, "before_first", wrong)
    with pytest.raises(ExportError, match=r"batch 3, prefill 1, .*decode.onnx does not compute what the model does"):
        gatecc.export(Mixed(Convolution(cut=True)).eval(), tmp_path / "x", (IDS,), decode=True)
    assert not list(tmp_path.iterdir())


class Cancelling(Mixed):
    """Float32 is 5e-4 off: what it adds is rounded to 2 ** -10."""

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + 1e4 - 1e4


def test_rounding_is_held_against_the_model_in_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is off by given numbers, and a decoder in torch that allows nothing."""

    model = Cancelling(Convolution(cut=True)).eval()
    made = gatecc.decoder(model, (IDS,))
    step = made.closed(1 << 13)
    of = steps.text(made, step, model, ((IDS,), {}), encode_in_torch(made))
    session: Any = SimpleNamespace(reference=False)

    def errors(off: float) -> set[float]:
        monkeypatch.setattr(steps, "_logits", lambda _, __, of, pieces: of.logits[:, : sum(pieces)] + off)
        found = steps.compare_steps(made, step, of, session, lambda *_: "", singly=False)
        return {compared.error for compared in found}

    monkeypatch.setattr(steps, "_in_torch", lambda _, of, pieces: of.logits[:, : sum(pieces)])
    assert all(2e-4 < error < 2e-3 for error in errors(1e-3))
    with pytest.raises(ExportError, match=r"torch by 0; from float64 torch is 0.000\d+ off, ONNX Runtime 0.0\d+"):
        errors(1e-1)


def test_a_decoder_that_is_as_wrong_excuses_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both begin with states that are a little off, by which the logits are 1e-3 off; float32 is off by 1e-7."""
    first, torchs = steps.before_first, steps._in_torch
    monkeypatch.setattr(steps, "before_first", lambda *args: [x + 1e-2 for x in first(*args)])
    monkeypatch.setattr(steps, "_in_torch", lambda *args: torchs(*args) + 2e-3)
    with pytest.raises(ExportError, match=r"decoder in torch by 0\.00\d+; .* torch is \d.*e-0[78] off") as told:
        gatecc.export(Mixed(Convolution(cut=True)).eval(), tmp_path / "x", (IDS,), decode=True)
    assert "at most 0.0001" in str(told.value)


class Backward(nn.Module):
    """Each token sees all."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, N, D)"""
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_a_model_without_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DecoderError, match="does not prove causal"):
        gatecc.export(Mixed(Backward()).eval(), tmp_path / "x", (IDS,), decode=True)
    assert not list(tmp_path.iterdir())
