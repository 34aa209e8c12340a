"""Telling values for the inputs of a mask, and what their effect says about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import fx

from gatecc.ir.evaluate import UnprovableError
from gatecc.ir.mask import Mask
from gatecc.ir.sizes import Sizes, value

# Values that may hide a key, tried until some have an effect: those of a 0/1 mask, then others. Keyed by: is it float?
PROBED: dict[bool, tuple[tuple[float, ...], ...]] = {
    False: ((0, 1), (2, -1)),
    True: ((0.0, 1.0), (-1e4, -torch.inf)),
}


@dataclass(frozen=True)
class Probe:
    """``tensor`` differs from the neutral value where ``changed`` (B, m) is True, or restarts at ``segments`` (m,)."""

    tensor: torch.Tensor
    changed: torch.Tensor | None = None
    segments: torch.Tensor | None = None


def fills(node: fx.Node, sizes: Sizes) -> Iterator[torch.Tensor]:
    """Values of an input that may hide nothing: ones, zeros, and positions."""
    held = node.meta["val"]
    shape = [value(s, sizes) for s in held.shape]
    yield torch.ones(shape, dtype=held.dtype)
    yield torch.zeros(shape, dtype=held.dtype)
    if shape and held.dtype in (torch.int64, torch.int32):
        yield torch.arange(shape[-1], dtype=held.dtype).expand(shape).contiguous()


def probes(node: fx.Node, neutral: torch.Tensor, others: tuple[float, ...], visible: torch.Tensor) -> Iterator[Probe]:
    """Other values of an input: some keys hidden, and sequences packed into one."""
    keys = visible.shape[-1]
    if not neutral.ndim or neutral.shape[-1] != keys or neutral.numel() != neutral.shape[0] * keys:
        raise UnprovableError(f"it is the input {node.name}, or made of its values")
    batch = neutral.shape[0] if neutral.ndim > 1 else 1
    flat = neutral.reshape(batch, keys)
    for other in others:
        for start in (keys - 2, 1):  # the end of the sequence, or all but its start; rows differ
            changed = torch.arange(keys).expand(batch, keys) >= start + torch.arange(batch)[:, None] % 2
            changed = changed & (flat != other)
            yield Probe(
                torch.where(changed, torch.tensor(other, dtype=neutral.dtype), flat).reshape(neutral.shape), changed
            )
    if neutral.dtype in (torch.int64, torch.int32):
        segments = (torch.arange(keys) >= keys // 2).to(neutral.dtype)
        restart = torch.cat([torch.arange(keys // 2), torch.arange(keys - keys // 2)]).to(neutral.dtype)
        yield Probe(restart.expand(batch, keys).reshape(neutral.shape).clone(), segments=segments)
        yield Probe((segments + 1).expand(batch, keys).reshape(neutral.shape).clone(), segments=segments)


def judge(mask: Mask, effects: set[tuple[bool, str]], node: fx.Node) -> Mask:
    """What the probes of one input, (packed or not, effect), say about the mask that the neutral inputs show."""
    if (True, "packed") in effects and mask.causal:
        return replace(mask, kind="packed")
    seen = {effect for packed, effect in effects if not packed} - {"none"}
    if seen and seen <= {"padding", "padding of both"}:
        return replace(mask, padding=True, both=mask.both or "padding of both" in seen)
    return Mask(
        "unknown", bias=mask.bias, reason=f"it depends on the values of the input {node.name} in a way without a name"
    )


def effect(base: torch.Tensor, probe: Probe, shown: torch.Tensor) -> str:
    """ "none", "padding" (the changed keys are hidden), "padding of both" (those queries see nothing, too), "packed"
    (other segments are hidden) or "other"."""
    if _matches(shown, base):
        return "none"
    if probe.segments is not None:
        together = probe.segments[:, None] == probe.segments
        if base.shape[-2] not in (1, len(together)):
            return "other"  # cross-attention: queries have no place in the segments of the keys
        return "packed" if _matches(shown, base & together) else "other"
    assert probe.changed is not None
    keep = _per_key(~probe.changed, shown)
    if keep is None:
        return "other"
    hidden = base & keep
    own = base & torch.eye(*base.shape[-2:], dtype=torch.bool)  # padding may see itself, lest it see nothing
    if _matches(shown, hidden) or _matches(shown, hidden | own):
        return "padding"
    square = base.shape[-2] == base.shape[-1]
    return "padding of both" if square and torch.equal(*torch.broadcast_tensors(shown, hidden & keep.mT)) else "other"


def _matches(shown: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal, except in rows that are expected to see nothing: those may be anything."""
    shown, expected = torch.broadcast_tensors(shown, expected)
    live = expected.any(-1)
    return torch.equal(shown[live], expected[live])


def _per_key(keep: torch.Tensor, visible: torch.Tensor) -> torch.Tensor | None:
    """(B, m) -> broadcastable to visible (B, ..., m), or (B * heads, n, m); None if the batch axis is not to be
    seen."""
    batch, keys = keep.shape
    if visible.ndim == 2:
        return keep if batch == 1 else None
    first = visible.shape[0]
    if first % batch:
        return None
    keep = keep.repeat_interleave(first // batch, 0)
    return keep.reshape(first, *(1,) * (visible.ndim - 2), keys)
