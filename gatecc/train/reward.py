"""The loss of each sample, for gates that learn by REINFORCE."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule
from gatecc.ops.estimators import write_reward


def set_reward(model: nn.Module, loss: Tensor, *, reduction: Literal["mean", "sum"] = "mean") -> None:
    """Tell the REINFORCE gates of a model the loss of each sample, (B,), between forward and backward.

    ``reduction`` is that of the loss that is differentiated, so that gates and other parameters have gradients of one
    scale:

        loss = F.cross_entropy(model(x), y, reduction="none")
        gatecc.train.set_reward(model, loss.detach())
        loss.mean().backward()

    Raises ArgumentError if the model has no such gate, or the loss is not (B,).
    """
    gates = [m for m in model.modules() if isinstance(m, GateModule) and m.spec.estimator.tag == "reinforce"]
    if not gates:
        raise ArgumentError(
            "no gate of this model learns by REINFORCE", expected="GateSpec(..., estimator='reinforce')"
        )
    scale = 1.0 / max(1, loss.numel()) if reduction == "mean" else 1.0
    for gate in gates:
        buffers = [gate.get_buffer(name) for name in ("reward", "reward_count", "reward_state")]
        write_reward(buffers[0], buffers[1], buffers[2], loss.detach(), scale=scale)
