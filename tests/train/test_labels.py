"""gate_bce."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from gatecc.train import gate_bce


def test_plain_and_balanced() -> None:
    logits, labels = torch.randn(50, 4), (torch.arange(200).reshape(50, 4) % 10 == 0).float()
    torch.testing.assert_close(gate_bce(logits, labels), F.binary_cross_entropy_with_logits(logits, labels))
    for limit, weight in ((5.0, 5.0), (20.0, 9.0)):
        want = F.binary_cross_entropy_with_logits(logits, labels, pos_weight=torch.tensor(weight))
        torch.testing.assert_close(gate_bce(logits, labels, balance=limit), want)
    off = torch.zeros(50, 4)  # no unit is on: nothing to weigh, and no division by zero
    torch.testing.assert_close(gate_bce(logits, off, balance=5.0), F.binary_cross_entropy_with_logits(logits, off))
