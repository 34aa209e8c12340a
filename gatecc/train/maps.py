"""Maps: what the maps of a model say, as outputs on the side, and the masks that a discriminator compares them with."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gatecc.errors import ArgumentError, TrainingError
from gatecc.passes.map_gate import ClassMaps
from gatecc.train.batches import Batch, call_of, device_of


class Mapped(NamedTuple):
    """The model's own ``output``, and the ``maps`` (B, classes, H, W) of its gates by their names."""

    output: Any
    maps: dict[str, Tensor]


def class_maps(model: nn.Module, batch: Batch) -> Mapped:
    """Run a model on a batch (as for `heal`) and keep its maps, at every scale. Gradients reach the model.

    Raises TrainingError for a model without maps.
    """
    known = {name: m for name, m in model.named_modules() if isinstance(m, ClassMaps)}
    if not known:
        raise TrainingError(
            "the model has no maps",
            where=type(model).__name__,
            do='gatecc.transform(model, gatecc.recipe("multi-scale-gates", sites="conv[decoder.*]"), inputs)',
        )
    found = dict[str, Tensor]()
    hooks = [
        m.register_forward_hook(lambda module, given, result, name=name: found.update({name: result}))
        for name, m in known.items()
    ]
    args, kwargs = call_of(batch, device_of(model))
    try:
        output = model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return Mapped(output, found)


def mask_pyramid(masks: Tensor, maps: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Real masks at the scales of maps, one-hot: what a discriminator is to take maps for.

    masks: (B, H, W) of class numbers -> (B, classes, h, w) for each map. Raises ArgumentError for unknown classes.
    """
    classes = {m.size(1) for m in maps.values()}
    if len(classes) != 1 or not 0 <= int(masks.min()) <= int(masks.max()) < max(classes):
        raise ArgumentError(
            "the masks have other classes than the maps",
            found=f"classes {int(masks.min())} to {int(masks.max())}, maps of {sorted(classes)}",
            expected="class numbers from 0, the background, to classes - 1",
        )
    whole = F.one_hot(masks, max(classes)).movedim(-1, 1).to(torch.get_default_dtype())
    return {name: F.interpolate(whole, size=m.shape[2:], mode="nearest").to(m) for name, m in maps.items()}
