"""Examples: inputs of the same form as a user's example inputs, without what is in them.

A checkpoint captures its graphs again from example inputs. Graphs depend on shapes, dtypes and masks, not on what the
inputs say: values are drawn anew from the range of the old ones, and what has structure keeps it.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

_TOKEN = re.compile(r"token_(id|ids|index)$")  # names of configurations for ids that mean something to the model
IGNORED = -100  # the label that torch's losses leave out
MASKED = -1e4  # what is at most this in a float mask lets nothing through
RUN = 2  # equal ids at an end of a row, from which on they are padding
LISTED = 1 << 20  # ranges up to this are listed to leave values out


def synthetic(tensor: torch.Tensor, special: Collection[int], seed: int) -> torch.Tensor:
    """A tensor of the shape, dtype and range of another; the same for the same seed.

    Kept as they are: masks whose rows are runs (padding, causal, blocks), positions and segment numbers, sequence
    offsets, ``special`` ids and padding. Other masks are shuffled within their rows. Everything else is uniform between
    the smallest and the largest value.
    """
    if tensor.numel() == 0 or structural(tensor):
        return tensor.detach().clone()
    x = tensor.detach().cpu()
    generator = torch.Generator().manual_seed(seed)
    if _binary(x):
        return _shuffled(x, generator).to(tensor.device)
    if x.is_complex():
        parts = torch.view_as_real(x)
        return torch.view_as_complex(_uniform(parts, generator).contiguous()).to(tensor.device)
    made = _uniform(x, generator) if x.is_floating_point() else _integers(x, special, generator)
    return made.to(tensor.device)


def special_ids(model: nn.Module) -> frozenset[int]:
    """The token ids that the configurations of a model name (padding, end, image places), and the ignored label."""
    found = {IGNORED}
    for module in model.modules():
        config: Any = vars(module).get("config")
        if hasattr(config, "to_dict"):
            found |= set(_ids(config.to_dict()))
    return frozenset(found)


def structural(tensor: torch.Tensor) -> bool:
    """Whether the values of a tensor are form and not content: masks of runs, positions, offsets."""
    x = tensor.detach().cpu()
    if x.is_complex() or x.numel() == 0:
        return False
    if x.is_floating_point():
        return _additive(x) or (_binary(x) and _runs(x))
    if x.dtype == torch.bool or _binary(x):
        return x.dim() > 1 and _runs(x)
    return _positions(x) or _offsets(x)


def _ids(data: Any) -> Iterator[int]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _ids(value)
        elif _TOKEN.search(str(key)):
            yield from (v for v in (value if isinstance(value, list | tuple) else [value]) if type(v) is int)


def _binary(x: torch.Tensor) -> bool:
    return x.dtype == torch.bool or bool(((x == 0) | (x == 1)).all())


def _additive(x: torch.Tensor) -> bool:
    """A float mask: 0 where attention may look, and at most -1e4 elsewhere."""
    return bool(((x == 0) | (x <= MASKED)).all())


def _runs(x: torch.Tensor) -> bool:
    """Whether each row is made of at most three runs: padding, causal, windowed and block masks are."""
    if x.dim() == 0 or x.shape[-1] < 2:
        return True
    return bool(((x[..., 1:] != x[..., :-1]).sum(-1) <= 2).all())


def _positions(x: torch.Tensor) -> bool:
    """Whether rows count up by 0 or 1, or begin again at 0: position ids, segments, packed rows."""
    if x.dim() == 0 or x.shape[-1] < 2:
        return False
    step = x[..., 1:].long() - x[..., :-1].long()
    return bool(((step == 0) | (step == 1) | (x[..., 1:] == 0)).all() & (step != 0).any())


def _offsets(x: torch.Tensor) -> bool:
    """Where packed sequences begin and end: 0, then rising."""
    return x.dim() == 1 and x.numel() > 1 and int(x[0]) == 0 and bool((x[1:].long() > x[:-1].long()).all())


def _shuffled(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    order = torch.rand(x.shape, generator=generator).argsort(-1) if x.dim() else torch.zeros((), dtype=torch.long)
    return x.gather(-1, order)


def _uniform(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Finite values anew; infinities and NaN stay where they are."""
    finite = torch.isfinite(x)
    if not bool(finite.any()):
        return x.clone()
    low, high = x[finite].min().double(), x[finite].max().double()
    drawn = low + (high - low) * torch.rand(x.shape, generator=generator, dtype=torch.float64)
    return torch.where(finite, drawn.clamp(low, high).to(x.dtype), x)


def _integers(x: torch.Tensor, special: Collection[int], generator: torch.Generator) -> torch.Tensor:
    """Ids anew, but for special ids and padding, of which there are then no more than before."""
    kept = torch.zeros(x.shape, dtype=torch.bool)
    for value in special:
        kept |= x == value
    kept |= _padding(x)
    free = x[~kept].long()
    if not free.numel():
        return x.clone()
    low, high = int(free.min()), int(free.max())
    drawn = torch.randint(low, high + 1, x.shape, generator=generator)
    taken = {int(v) for v in x[kept].unique()} | set(special)
    if any(low <= v <= high for v in taken) and high - low < LISTED:
        allowed = torch.tensor([v for v in range(low, high + 1) if v not in taken])
        drawn = allowed[torch.randint(0, len(allowed), x.shape, generator=generator)]
    return torch.where(kept, x, drawn.to(x.dtype))


def _padding(x: torch.Tensor) -> torch.Tensor:
    """Runs of one value at either end of a row, where the rows of a batch agree on the value."""
    kept = torch.zeros(x.shape, dtype=torch.bool)
    if x.dim() < 2 or x.shape[-1] <= RUN:
        return kept
    for end in (0, -1):
        same = x == x[..., end : end + 1 if end == 0 else None]
        same = same if end == 0 else same.flip(-1)
        run = same.long().cumprod(-1).bool()
        run &= run.sum(-1, keepdim=True) >= RUN
        kept |= run if end == 0 else run.flip(-1)
    return kept
