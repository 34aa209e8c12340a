"""Channels: what a network with gated channels costs, by its labels and by its gates."""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from gatecc.capture.flops import counted
from gatecc.capture.modes import in_eval
from gatecc.errors import ArgumentError
from gatecc.ir.gate import GateModule
from gatecc.ir.gates.estimator import Supervised
from gatecc.ops.gated_conv.arguments import Arguments, read
from gatecc.ops.gated_conv.kernels import served


@dataclass(frozen=True)
class ChannelCosts:
    """FLOPs of a model per sample, the mean over a batch: ``dense`` with every channel on, ``labels`` with the channels
    that the labels of its gates have on, ``gates`` with those that the gates have."""

    dense: float
    labels: float
    gates: float


@torch.no_grad()
def channel_costs(model: nn.Module, *args: Any, **kwargs: Any) -> ChannelCosts:
    """What a model with supervised channel gates (recipe "ftwt") costs on a batch, each sample by itself.

    Labels depend on r and on the model alone, so that they tell before any training what an r will cost. Samples that
    share a batch may compute more: what any of them has on.

    Raises ArgumentError if the model has no such gates, or gates of other estimators among them.
    """
    convolutions, labels = _Convolutions(), _Labels()
    with _modes(model, gates=False), convolutions:
        _, ran = counted(lambda: model(*args, **kwargs))
    with _modes(model, gates=True), labels:
        model(*args, **kwargs)
    found = convolutions.found
    if not found or [a.gate.flatten(1).shape for a in found] != [x.shape for x in labels.found]:
        raise ArgumentError(
            "the channels of this model have no labels",
            found=f"{len(found)} gated convolutions, {len(labels.found)} gates with labels",
            expected='convolutions with gates of estimator="supervised(...)", as the recipe "ftwt" makes them',
        )
    rest, B = ran - sum(2 * a.places * served(a)[0] for a in found), found[0].x.size(0)
    by_gates = [a.gate.flatten(1) for a in found]
    masks = ([torch.ones_like(gate) for gate in by_gates], labels.found, by_gates)
    return ChannelCosts(*((rest + _flops(found, on)) / B for on in masks))


@torch.no_grad()
def calibrate_channels(model: nn.Module, *args: Any, **kwargs: Any) -> None:
    """Shift the biases of supervised channel gates so that they keep as many channels of a batch as their labels do.

    A gate that is unsure of a label guesses the likelier side, so that thresholds alone may keep too few or too many.
    One number per gate, from the first to the last: what one keeps is what the next ones read.

    Raises ArgumentError for a model whose gates have no labels, or no bias.
    """
    gates = [m for m in model.modules() if isinstance(m, GateModule) and isinstance(m.spec.estimator, Supervised)]
    if not gates or any(g.spec.scorer.constant not in dict(g.named_parameters()) for g in gates):
        raise ArgumentError(
            "there is nothing to calibrate",
            found=f"{len(gates)} supervised gates",
            expected='gates of estimator="supervised(...)" whose scorer has a bias, as the recipe "ftwt" makes them',
        )
    for at in range(len(gates)):
        labels = _Labels({g.get_parameter(g.spec.scorer.constant).data_ptr(): g for g in gates})
        with _modes(model, gates=True), labels:
            model(*args, **kwargs)
        scores, kept = labels.logits[at].flatten().sort(descending=True).values, int(labels.found[at].sum())
        cut = (scores[max(kept, 1) - 1] + scores[min(kept, len(scores) - 1)]) / 2
        gate = labels.gates[at]
        gate.get_parameter(gate.spec.scorer.constant).sub_(cut if 0 < kept < len(scores) else scores[-1] - 1)


def _flops(calls: list[Arguments], masks: list[Tensor]) -> float:
    """Of the convolutions, each sample by itself. masks: (B, Cout), in the order of the calls."""
    total = 0.0
    for a, mask in zip(calls, masks, strict=True):
        before = next((m for c, m in zip(calls, masks, strict=True) if c.gate is a.inputs), None)
        columns = a.weight.size(1 - a.rows) if before is None else (before != 0).sum(1)
        total += 2 * a.places * float(((mask != 0).sum(1) * columns).sum())
    return total


class _Convolutions(TorchDispatchMode):
    """Sees the gated convolutions of a call."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[Arguments] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.gatecc.gated_conv.default:
            given: tuple[Any, ...] = (*args, None, None)
            x, weight, gate, bias, inputs = given[:5]
            self.found.append(read(x, weight, gate, bias, inputs, kwargs or {}))
        return func(*args, **(kwargs or {}))


class _Labels(TorchDispatchMode):
    """Sees the labels that gates learn from, the scores beside them, and whose they are: of the gate among ``biases``
    (by their memory) that was read last."""

    def __init__(self, biases: Mapping[int, GateModule] | None = None) -> None:
        super().__init__()
        self.biases, self.last = biases or {}, list[GateModule]()
        self.found: list[Tensor] = []
        self.logits: list[Tensor] = []
        self.gates: list[GateModule] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.biases:
            tensors = [a for a in args if isinstance(a, Tensor)]
            self.last = [self.biases[t.data_ptr()] for t in tensors if t.data_ptr() in self.biases] or self.last
        if func is torch.ops.gatecc.inject_bce.default:
            self.logits.append(args[0])
            self.found.append(args[1])
            self.gates += self.last
        return func(*args, **(kwargs or {}))


@contextmanager
def _modes(model: nn.Module, *, gates: bool) -> Generator[None]:
    """The model in eval mode, its gates in training or not."""
    with in_eval(model):
        for module in model.modules():
            if isinstance(module, GateModule):
                module.training = gates
        yield
