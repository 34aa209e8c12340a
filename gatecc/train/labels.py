"""Supervised gates trained by a loop of one's own: labels and their loss.

A gate with ``estimator=supervised`` needs neither: it makes its labels and adds their gradient while it trains.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.ir.gates.label import topk_mass as topk_mass


def gate_bce(logits: Tensor, labels: Tensor, *, balance: float | None = None) -> Tensor:
    """Mean binary cross entropy of gate logits (..., F) with labels in {0, 1} of the same shape.

    ``balance`` weighs positives by negatives over positives of the batch, at most that factor (JEI-DNN clips at 5), so
    that rare labels are learned.
    """
    if balance is None:
        return F.binary_cross_entropy_with_logits(logits, labels)
    positive = labels.sum()
    weight = torch.clamp((labels.numel() - positive) / positive.clamp_min(1.0), max=balance)
    return F.binary_cross_entropy_with_logits(logits, labels, pos_weight=weight)
