"""decode.onnx of models that take an attention_mask: prompts of several lengths, padded on either side."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gatecc
from gatecc.errors import ArgumentError, ExportError
from gatecc.export import ragged
from gatecc.export.encoder import encode_in_torch
from gatecc.export.padding import tokens_first
from gatecc.export.steps import text
from gatecc.onnx import Session

pytest.importorskip("onnxruntime")
ir = pytest.importorskip("onnx_ir")
EXPORT, DECODE = sys.modules["gatecc.export"], sys.modules["gatecc.export.decode"]
V, N, LENGTHS, PLACES = 20, 9, (9, 5, 2), 40
IDS = torch.randint(1, V, (3, N), generator=torch.Generator().manual_seed(0))


class Masked(nn.Module):
    """One layer of attention that hides padding, with learned positions of the tokens, or of padding too."""

    def __init__(self, *, of_tokens: bool) -> None:
        super().__init__()
        self.of_tokens = of_tokens
        self.embed, self.places, self.head = nn.Embedding(V, 16), nn.Embedding(PLACES, 16), nn.Linear(16, V)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 8), nn.Linear(16, 8)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B, N, V)"""
        at = torch.arange(input_ids.shape[1])
        x = self.embed(input_ids) + self.places((attention_mask.cumsum(1) - 1).clamp(min=0) if self.of_tokens else at)
        q, k, v = (f(x).unflatten(-1, (-1, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        seen = (at <= at[:, None]) & attention_mask[:, None, None].bool()
        y = nn.functional.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True)
        return self.head(x + y.transpose(1, 2).flatten(2))


def padded(side: str) -> tuple[Tensor, Tensor]:
    """The prompts and their mask. (3, N), (3, N)"""
    ids, mask = torch.zeros_like(IDS), torch.zeros_like(IDS)
    for row, length in enumerate(LENGTHS):
        at = slice(0, length) if side == "right" else slice(N - length, N)
        ids[row, at], mask[row, at] = IDS[row, :length], 1
    return ids, mask


def test_attention_counts_the_tokens_of_each_row(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Masked(of_tokens=True).eval()
    made = gatecc.export(model, tmp_path, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, decode=True)
    assert made.decode is not None
    assert (made.decode.padding, made.decode.genai.padding, made.decode.kept) == ("right", "right", "")
    assert made.decode.context_length == PLACES
    assert f"no more than {PLACES} tokens" in made.decode.genai.limits[0]
    assert made.decode.operators["com.microsoft::GroupQueryAttention"] == 1
    session, last = Session(tmp_path), torch.tensor([[3], [7], [11]])
    for side in ("left", "right"):
        ids, mask = padded(side)
        logits, state = session.prefill(ids, attention_mask=mask)
        after = session.step(last, state)[0]
        longer, shown = torch.cat([ids, last], 1), torch.cat([mask, torch.ones_like(last)], 1)
        expected = model(longer, shown).detach()
        seen = mask.bool()
        torch.testing.assert_close(logits[seen], expected[:, :-1][seen], rtol=0, atol=1e-5)
        torch.testing.assert_close(after[:, 0], expected[:, -1], rtol=0, atol=1e-5)


def test_positions_that_count_padding_keep_the_mask(tmp_path: Path) -> None:
    """The model gives other logits for a prompt that is padded on the left, and so does the file."""
    torch.manual_seed(0)
    model = Masked(of_tokens=False).eval()
    made = gatecc.export(model, tmp_path, {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}, decode=True)
    assert made.decode is not None
    assert made.decode.padding == "left"
    assert "padding on the left changes what the model computes" in made.decode.kept
    assert made.decode.kept in " ".join(made.decode.genai.limits)
    session, (ids, mask) = Session(tmp_path), padded("left")
    logits, expected = session.prefill(ids, attention_mask=mask)[0], model(ids, mask).detach()
    torch.testing.assert_close(logits[mask.bool()], expected[mask.bool()], rtol=0, atol=1e-5)
    with pytest.raises(ArgumentError, match="padded on the left"):
        session.prefill(*padded("right")[:1], attention_mask=padded("right")[1])


class OfWords(nn.Module):
    """Its positions count the tokens that are not 0, so that they depend on the tokens."""

    config: SimpleNamespace

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.places, self.head = nn.Embedding(V, 8), nn.Embedding(PLACES, 8), nn.Linear(8, V)

    def forward(self, input_ids: Tensor) -> Tensor:
        """(B, N) -> (B, N, V)"""
        return self.head(self.embed(input_ids) + self.places((input_ids != 0).long().cumsum(1) - 1))


def test_a_model_that_tells_nobody_how_many_tokens_it_is_for() -> None:
    """It runs on the example inputs, and not on as many tokens as are compared."""
    model = OfWords().eval()
    made, inputs = gatecc.decoder(model, (IDS,)), ((IDS,), {})
    step = made.closed(1 << 13)
    with pytest.raises(ExportError, match="does not run on a text as long") as told:
        text(made, step, model, inputs, encode_in_torch(made))
    assert "70 tokens: IndexError" in str(told.value)
    model.config = SimpleNamespace(max_position_embeddings=PLACES)
    assert text(made, step, model, inputs, encode_in_torch(made)).ids.shape[1] == PLACES


def test_tokens_come_first_in_each_row() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1]])
    assert tokens_first(mask).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3], [0, 1, 2, 3]]


class Words(nn.Module):
    """Bidirectional attention that hides what ``hides`` says, as nn.TransformerEncoder has it or the other way round;
    or else a mask that only makes words smaller, and hides nothing."""

    def __init__(self, hides: str) -> None:
        super().__init__()
        self.hides, self.embed, self.out = hides, nn.Embedding(V, 16), nn.Linear(16, 5)
        self.layer = nn.MultiheadAttention(16, 2, batch_first=True)

    def forward(self, ids: Tensor, which: Tensor) -> Tensor:
        """(B, N), (B, N) -> (B, N, 5)"""
        x = self.embed(ids)
        if self.hides == "nothing":
            return self.out(self.layer(x, x, x)[0] + x * which[..., None])
        hidden = which.bool() if self.hides == "ones" else ~which.bool()
        return self.out(x + self.layer(x, x, x, key_padding_mask=hidden)[0])


@pytest.mark.parametrize("hides", ["ones", "zeros", "nothing"])
def test_a_mask_is_told_by_what_it_does(hides: str) -> None:
    torch.manual_seed(0)
    model, which = Words(hides).eval(), torch.full_like(IDS, int(hides != "ones"))
    found = {x.side: x for x in ragged.padded(["ids", "which"], [IDS, which], lambda leaves: [model(*leaves)])}
    assert set(found) == {"left", "right"}
    hidden = torch.stack([torch.arange(N) < row * N // 6 for row in range(3)])
    for side, seen in (("left", ~hidden), ("right", ~hidden.flip(1))):
        assert torch.equal(found[side].leaves[1], (~seen if hides == "ones" else seen).long())
        told = seen[..., None].expand(3, N, 5)
        assert torch.equal(found[side].told[0], torch.ones_like(told) if hides == "nothing" else told)


def lose(name: str, value: int, where: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are written with this mask as it is in the example, where it hides nothing."""
    right = where.build

    def without(*args: Any, **options: Any) -> Any:
        graph = right(*args, **options)
        mask = next((v for v in graph.model.graph.inputs if v.name == name), None)
        if mask is None:
            return graph
        users, number = tuple(mask.uses()), ir.Value(name="number", const_value=ir.tensor([value], name="number"))
        graph.model.graph.register_initializer(number)
        kept = ir.node("Max" if value else "Min", [mask, number])
        graph.model.graph.insert_before(graph.model.graph[0], kept)
        for user, at in users:
            user.replace_input_with(at, kept.outputs[0])
        return graph

    monkeypatch.setattr(where, "build", without)


@pytest.mark.parametrize("hides", ["zeros", "ones", "nothing"])
def test_a_mask_that_is_lost_is_seen(hides: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it is called. Lost: the graph is written with the mask of the example, which hides nothing."""
    value = int(hides != "ones")
    model, inputs = Words(hides).eval(), (IDS, torch.full_like(IDS, value))
    if hides == "zeros":
        assert {c.padding for c in gatecc.export(model, tmp_path / "x", inputs).compared} == {"", "left", "right"}
        return
    lose("which", value, EXPORT, monkeypatch)
    with pytest.raises(ExportError, match=r"padded on the left(?s:.*)the first node that differs is \w+ "):
        gatecc.export(model, tmp_path / "x", inputs)


class Reader(nn.Module):
    """Attention to what was told, and to what was read: in both an input hides places, ones or zeros of it."""

    def __init__(self, ones: str) -> None:
        super().__init__()
        self.ones, self.embed, self.out = ones, nn.Embedding(V, 16), nn.Linear(16, V)

    def forward(self, ids: Tensor, told: Tensor, read: Tensor, shown: Tensor) -> Tensor:
        """(B, N), (B, N), (B, M), (B, M) -> (B, N, V)"""
        at = torch.arange(ids.shape[1])
        x, y = self.embed(ids)[:, None], self.embed(read)[:, None]
        seen = [(mask == (0 if self.ones == "hide" else 1))[:, None, None] for mask in (told, shown)]
        attend = nn.functional.scaled_dot_product_attention
        x = x + attend(x, x, x, seen[0] & (at <= at[:, None]))
        return self.out((x + attend(x, y, y, seen[1]))[:, 0])


@pytest.mark.broad(3)
@pytest.mark.parametrize(("ones", "lost"), [("hide", ""), ("hide", "told"), ("show", "shown")])
def test_a_mask_of_steps_is_told_by_what_it_does(
    ones: str, lost: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the tokens and of a context, under names that say nothing."""
    torch.manual_seed(0)
    value, read = int(ones == "show"), torch.randint(1, V, (3, 14))
    inputs = (IDS, torch.full_like(IDS, value), read, torch.full_like(read, value))
    if lost:
        file = "encoder" if lost == "shown" else "decode"
        lose(lost, value, DECODE, monkeypatch)
        with pytest.raises(ExportError, match=rf"{file}.onnx does not compute what the model does(?s:.*)first node"):
            gatecc.export(Reader(ones).eval(), tmp_path / "x", inputs, decode=True)
        return
    made = gatecc.export(Reader(ones).eval(), tmp_path / "x", inputs, decode=True).decode
    assert made is not None
    assert {c.padding for c in made.compared if c.sizes["batch"] == 3} == {"left"}
    assert {c.padding for c in made.compared if c.sizes["batch"] == 1} == {""}
