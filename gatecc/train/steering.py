"""Steering: the controller of `guiding-giants`, trained on cached activations."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.capture.signature import split_inputs
from gatecc.errors import ArgumentError
from gatecc.passes.branch.steer import Controller, controllers


def controller_loss(controller: Controller, c: Tensor, labels: Tensor, weight: float = 0.1) -> Tensor:
    """BCE(s, label) + weight (mean |sigmoid(z) - 1/2| + 0.01 mean sigmoid(z)); s is a logit. c: (N, layers C), labels:
    (N,), 1 where the model is to be steered."""
    s, z = controller.scores(c)
    layers = z.sigmoid()
    task = F.binary_cross_entropy_with_logits(s, labels.to(s))
    return task + weight * ((layers - 0.5).abs().mean() + 0.01 * layers.mean())


@torch.no_grad()
def controller_inputs(model: nn.Module, batches: Iterable[Any]) -> Tensor:
    """What the controller of a model reads at the last token of each sample, (N, layers C): to be cached.

    ``batches`` are inputs as `gatecc.transform` takes them. Raises ArgumentError without a controller, or batches.
    """
    controller, read = _controller(model), list[Tensor]()
    handle = controller.register_forward_pre_hook(lambda _, args: read.append(args[0][:, -1].detach().clone()))
    training = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for batch in batches:
            args, kwargs = split_inputs(batch)
            model(*args, **kwargs)
    finally:
        handle.remove()
        for module, was in training:
            module.training = was
    if not read:
        raise ArgumentError("there was no batch to read activations from")
    return torch.cat(read)


def fit_controller(
    model: nn.Module, c: Tensor, labels: Tensor, *, steps: int = 200, lr: float = 1e-3, weight: float = 0.1
) -> list[float]:
    """Train the controller of a model on cached activations (`controller_inputs`) by `controller_loss`, with Adam on
    all of them at once; the model itself does not run. Returns the losses.

    Raises ArgumentError without a controller, or for labels that are not one for each row.
    """
    controller = _controller(model)
    if labels.shape != c.shape[:1]:
        raise ArgumentError(
            "there is not one label for each activation", found=f"{tuple(labels.shape)}", expected=f"({c.size(0)},)"
        )
    parameters: Sequence[nn.Parameter] = list(controller.parameters())
    optimizer, losses = torch.optim.Adam(parameters, lr=lr), list[float]()
    with torch.enable_grad():
        for _ in range(steps):
            optimizer.zero_grad()
            loss = controller_loss(controller, c.to(parameters[0]), labels.to(parameters[0].device), weight)
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    optimizer.zero_grad()
    return losses


def _controller(model: nn.Module) -> Controller:
    found = controllers(model)
    if len(found) != 1:
        raise ArgumentError(
            "the model has no controller", found=f"{len(found)} of them", do='gatecc.transform(model, "guiding-giants")'
        )
    return found[0]
