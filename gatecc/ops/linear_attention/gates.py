"""Log decays from what is given for them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def log_decay(x: Tensor, normalizer: float | None) -> Tensor:
    """x itself; with a normaliser x holds logits, of which it is logsigmoid(x) / normalizer, in float32 at least."""
    if normalizer is None:
        return x
    return F.logsigmoid(x.to(torch.promote_types(x.dtype, torch.float32))) / normalizer
