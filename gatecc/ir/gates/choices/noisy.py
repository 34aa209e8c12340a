"""Noisy top-k: noise of a scored size is added to the logits in training, so that all experts are tried."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ir.gates.choice import Buffers, Choice, Chosen, Decision, at_most, largest


@dataclass(frozen=True)
class NoisyTopK(Choice, tag="noisy_topk"):
    """Softmax over the k largest of logits + n · std, n ~ N(0, 1) in training only (Shazeer et al. 2017).

    With ``learned`` std = softplus(scores of the noise) + floor: the scorer yields 2E numbers, the second half for the
    noise, which share its weights' rows. Otherwise std is the constant ``std``. The load of balance=cv2 is then the
    smooth probability that an expert is among the k when its own noise is drawn again, which has a gradient.
    """

    k: int
    learned: bool = True
    std: float = 1.0
    floor: float = 0.01

    def check(self) -> None:
        self.require(self.k > 0, "k", "a positive integer")
        self.require(self.std > 0, "std", "a positive number")
        self.require(self.floor > 0, "floor", "a positive number")

    @property
    def sums_to_one(self) -> bool:
        return True

    def slots(self, experts: int) -> int:
        return at_most(self.k, experts)

    def scores(self, experts: int) -> int:
        return 2 * experts if self.learned else experts

    def decide(self, logits: Tensor, buffers: Buffers, training: bool, keep: Tensor | None = None) -> Decision:
        clean, raw = logits.chunk(2, -1) if self.learned else (logits, None)
        if not training:
            return Decision(self._chosen(clean, largest(clean, self.k)), torch.softmax(clean, -1))
        std = torch.full_like(clean, self.std) if raw is None else F.softplus(raw) + self.floor
        noisy = clean + torch.randn_like(clean) * std
        order = largest(noisy, min(self.k + 1, clean.size(-1)))
        load = self._load(clean, noisy, std, order)
        return Decision(self._chosen(noisy, order[:, : self.k]), torch.softmax(clean, -1), load)

    def _chosen(self, scores: Tensor, indices: Tensor) -> Chosen:
        return Chosen(torch.softmax(scores.gather(-1, indices), -1), indices)

    def _load(self, clean: Tensor, noisy: Tensor, std: Tensor, order: Tensor) -> Tensor:
        """P(an expert is in the top k | the noise of the others): its score must exceed the k-th of the others."""
        if self.k == clean.size(-1):
            return torch.ones_like(clean)
        top = noisy.gather(-1, order)
        inside, outside = top[:, self.k :], top[:, self.k - 1 : self.k]
        bar = torch.where(noisy > inside, inside, outside)
        return torch.special.ndtr((clean - bar) / std)
