"""Prefixes: the first two phases of training experts of which a token takes the first n (Adaptive Computation Modules).

The third is `heal`, end to end: the counts are drawn by a hard Gumbel softmax, and balance=budget(share) is their
price.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.ir.gates.choices.prefix import Prefix
from gatecc.ir.router import Router
from gatecc.passes.route.experts import Experts
from gatecc.train.batches import Batch, Stream, call_of, device_of
from gatecc.train.layers import first_tensor, recorded


class PrefixLayer(NamedTuple):
    """A layer whose experts are taken in their order; ``name`` is that of the module that it was in the dense model."""

    name: str
    router: Router
    experts: Experts


def prefix_layers(model: nn.Module) -> list[PrefixLayer]:
    """The layers of a model that a rewrite with combine="prefix" made. Raises ArgumentError if there are none."""
    found = list(_layers(model))
    if not found:
        raise ArgumentError(
            "the model has no layers of learners", expected="one that was transformed by acm, or combine='prefix'"
        )
    return found


def _layers(model: nn.Module) -> Iterator[PrefixLayer]:
    for name, module in model.named_modules():
        if isinstance(module, Router) and isinstance(module.router.choice, Prefix):
            owner = name.rpartition(".")[0]
            around = model.get_submodule(owner)
            yield PrefixLayer(owner, module, next(m for m in around.children() if isinstance(m, Experts)))


def prefix_outputs(experts: Experts, x: Tensor) -> Tensor:
    """What the first 0, 1, ..., N experts yield, each without a gradient to the earlier ones. x: (T, d) -> (N + 1, T,
    o)
    """
    n = experts.down_proj.size(0)
    each: Tensor = torch.ops.gatecc.moe_ffn(
        x,
        x.new_ones(x.size(0), n),
        torch.arange(n, device=x.device).expand(x.size(0), n),
        experts.gate_up_proj,
        experts.down_proj,
        experts.gate_up_proj_bias,
        experts.down_proj_bias,
        activation=experts.activation,
        layout=experts.layout,
        combine="slots",
    )
    outputs = [torch.zeros_like(each[:, 0]) if experts.bias is None else experts.bias.expand_as(each[:, 0])]
    for expert in range(n):
        outputs.append(outputs[-1].detach() + each[:, expert])
    return torch.stack(outputs)


def count_labels(errors: Tensor, factor: float) -> Tensor:
    """The first n whose next expert lowers the error by less than a factor. errors: (N + 1, T) -> (T,)

    err_n / err_(n+1) < factor; all N where each expert is worth it.
    """
    enough = errors[:-1] < factor * errors[1:]
    last = torch.full_like(enough[:1], True)
    return torch.cat([enough, last]).int().argmax(0)


def train_learners(
    student: nn.Module, teacher: nn.Module, data: Iterable[Batch], *, steps: int, lr: float = 1e-3
) -> list[float]:
    """Phase 1: every prefix of experts learns what the dense layer yields, layer by layer; the losses of the steps.

    The loss of a layer is the sum over prefixes of the squared error, relative to the mean square of what the layer
    yields. Trains the experts in place. Raises ArgumentError if a layer computes something else in the teacher.
    """
    layers = prefix_layers(student)
    parameters = [p for layer in layers for p in layer.experts.parameters()]

    def loss(layer: PrefixLayer, x: Tensor, target: Tensor) -> Tensor:
        errors = (prefix_outputs(layer.experts, x) - target).square().mean((1, 2)) / target.square().mean()
        if float(errors[-1].detach()) > 1:
            raise ArgumentError(
                "the layer is something else in the teacher",
                where=layer.name,
                found=f"all its experts together are further from it than zero is ({float(errors[-1].detach()):.2g})",
                expected="the model before the rewrite, whose module of this name is the MLP",
            )
        return errors[1:].sum() if layer.experts.bias is None else errors.sum()

    return _train(teacher, layers, parameters, data, loss, steps, lr)


def train_counts(
    student: nn.Module, teacher: nn.Module, data: Iterable[Batch], *, steps: int, lr: float = 1e-3, factor: float = 1.25
) -> list[float]:
    """Phase 2: the routers learn `count_labels` by cross entropy; the losses of the steps. Trains the routers in place.

    Raises ArgumentError for a router that reads something else than the input of its layer.
    """
    layers = prefix_layers(student)
    for layer in layers:
        if [ref.stage for ref in layer.router.router.sources] not in (["in"], ["self"]):
            raise ArgumentError(
                "the router reads more than the input of its layer",
                where=layer.name,
                found=str(layer.router.router.source),
                expected="source in",
            )
    parameters = [p for layer in layers for p in layer.router.parameters()]

    def loss(layer: PrefixLayer, x: Tensor, target: Tensor) -> Tensor:
        with torch.no_grad():
            errors = (prefix_outputs(layer.experts, x) - target).square().sum(-1)
        value = x.unflatten(0, (1, -1)) if len(layer.router.shape.axes) == 3 else x
        logits = cast("Prefix", layer.router.router.choice).led(layer.router.logits(value, value))
        return F.cross_entropy(logits, count_labels(errors, factor))

    return _train(teacher, layers, parameters, data, loss, steps, lr)


def _train(
    teacher: nn.Module,
    layers: list[PrefixLayer],
    parameters: list[nn.Parameter],
    data: Iterable[Batch],
    loss: Any,
    steps: int,
    lr: float,
) -> list[float]:
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    stream, losses = Stream(data), list[float]()
    for _ in range(steps):
        args, kwargs = call_of(stream.next(), device_of(teacher))
        with torch.no_grad(), recorded(teacher, [layer.name for layer in layers]) as seen:
            teacher(*args, **kwargs)
        total = torch.zeros(())
        for layer in layers:
            for given, named, out in seen[layer.name].calls:
                x = first_tensor((given, named), layer.name)
                total = total + loss(layer, x.flatten(0, -2), out.flatten(0, -2))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(float(total.detach()) / len(layers))
    return losses
