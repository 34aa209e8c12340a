"""Co-activation: which hidden neurons fire together, measured on calibration inputs, as a partition for `Split`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from gatecc.errors import ArgumentError
from gatecc.passes.route import partition
from gatecc.passes.route.split import Measured, encoded
from gatecc.train.batches import Batch, call_of, device_of


@torch.no_grad()
def coactivation(
    model: nn.Module,
    batches: Iterable[Batch],
    groups: int,
    *,
    layers: Sequence[str],
    share: float = 0.1,
    tokens: int = 4096,
    neighbours: int = 16,
) -> Measured:
    """Hidden neurons in groups that fire for the same tokens, for ``Split(groups, by=...)`` and ``Groups``.

    ``layers``: names or globs of the modules of the last products, ``("model.layers.*.mlp.down_proj",)``: what they are
    given is the hidden features. ``batches`` as for `heal`. A neuron fires for the ``share`` of tokens for which it is
    largest, in absolute value; at most ``tokens`` of them are looked at. See `gatecc.passes.route.partition`.

    Raises ArgumentError if no module has such a name, if one is not called, or if ``groups`` does not divide its width.
    """
    modules = {n: m for n, m in model.named_modules() if any(fnmatchcase(n, glob) for glob in layers)}
    if not modules:
        raise ArgumentError(
            "there are no layers to measure",
            found=f"layers={tuple(layers)}",
            do="name the modules of the last products of the MLPs: gatecc.inspect shows them",
        )
    seen: dict[str, list[Tensor]] = {name: [] for name in modules}
    hooks = [m.register_forward_pre_hook(_hook(seen[n], tokens), with_kwargs=True) for n, m in modules.items()]
    training = model.training
    try:
        model.eval()
        for batch in batches:
            args, kwargs = call_of(batch, device_of(model))
            model(*args, **kwargs)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()
    return Measured(tuple(seen), tuple(encoded(_groups(n, x, groups, share, neighbours)) for n, x in seen.items()))


def _hook(into: list[Tensor], tokens: int) -> Any:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        left = tokens - sum(t.size(0) for t in into)
        into.append(x.detach().reshape(-1, x.size(-1))[: max(left, 0)].float().abs().cpu())

    return hook


def _groups(name: str, seen: list[Tensor], groups: int, share: float, neighbours: int) -> Tensor:
    """The group of each neuron, (F,)."""
    size = torch.cat(seen) if seen else torch.empty(0, 0)
    if not size.numel():
        raise ArgumentError(
            "the layer was not called",
            where=name,
            expected="batches that run it as a module",
            do="measure the model before it is transformed",
        )
    top = max(1, round(share * size.size(0)))
    active = size >= size.topk(top, 0).values[-1].clamp_min(torch.finfo(size.dtype).tiny)
    cut = partition.coactivation(active, groups, neighbours)
    chosen = torch.empty(size.size(1), dtype=torch.int64)
    chosen[cut.flatten()] = torch.arange(groups).repeat_interleave(cut.size(1))
    return chosen
