"""ragged: rows of several lengths, of which an input tells padding and tokens apart: an attention_mask, or what else
hides the places of a row.

Such a mask is told by what it does, whatever its name and whichever of its two values hides: outputs at tokens do not
change with what the other inputs hold at padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gatecc.scope.family import difference

MASK = "attention_mask"
_UNMOVED = 1e-5  # of the largest value: sums in another order
Run = Callable[[Sequence[Tensor]], list[Tensor] | None]
"""The outputs of a model, None if it does not run on these inputs."""


@dataclass(frozen=True)
class Padded:
    """Inputs that are padded on one side, and where their outputs say something, True in a tensor of each one's shape.

    Queries before the first token of their row see no key: each runtime gives something else there.
    """

    leaves: tuple[Tensor, ...]
    side: str
    told: list[Tensor]

    def tokens(self, outputs: Sequence[Tensor]) -> list[Tensor]:
        """The entries of outputs that say something; an output of another shape as it is."""
        return [x[told] if x.shape == told.shape else x for x, told in zip(outputs, self.told, strict=True)]


def padded(names: Sequence[str], leaves: Sequence[Tensor], run: Run) -> Iterator[Padded]:
    """The inputs with rows of several lengths, padded on the left and on the right: once for all that are named
    attention_mask, and once for each other input of two values (B, N). ``run``: the model."""
    for group in groups(names, leaves):
        for side in ("left", "right"):
            found = _padded(leaves, group, side, run, named=names[group[0]].endswith(MASK))
            if found is not None:
                yield found


def groups(names: Sequence[str], leaves: Sequence[Tensor]) -> list[list[int]]:
    """What may say which places of a row are padding: all inputs (B, N) that are named attention_mask together, and
    each other one of two values by itself."""
    may = [at for at, x in enumerate(leaves) if x.dim() == 2 and x.shape[1] > 1 and not x.is_complex()]
    named = [at for at in may if names[at].endswith(MASK)]
    others = [[at] for at in may if at not in named and bool(((leaves[at] == 0) | (leaves[at] == 1)).all())]
    return [named, *others] if named else others


@dataclass(frozen=True)
class Hiding:
    """Inputs with padding, and the outputs for them and for something else at padding. ``passed``: whether that makes
    no difference at tokens."""

    inputs: list[Tensor]
    outputs: list[Tensor]
    moved: list[Tensor]
    passed: bool


def hide(
    leaves: Sequence[Tensor], group: Sequence[int], seen: Sequence[Tensor], run: Run, *, named: bool
) -> Hiding | None:
    """The inputs with the places that are not ``seen`` hidden by these masks. (B, N) each

    ``named``: they are known to be masks of which 1 is a token. Of others, whichever value hides is found by what the
    model does; if none does, the one that fits the example better is taken. None if the model does not run on them.
    """
    first: Hiding | None = None
    often = int(leaves[group[0]].double().mean() >= 0.5)  # an example has more tokens than padding
    for token in (1,) if named else (often, 1 - often):
        inputs = list(leaves)
        for at, mask in zip(group, seen, strict=True):
            inputs[at] = (mask if token else ~mask).to(leaves[at].dtype)
        outputs = run(inputs)
        if outputs is None:
            continue
        other = _with_other_padding(inputs, group, seen)
        moved = (run(other) if other is not None else None) or outputs
        passed = named or (moved is not outputs and _passes_over(outputs, moved, seen[0]))
        found = Hiding(inputs, outputs, moved, passed)
        if passed:
            return found
        first = first or found
    return first


def _padded(leaves: Sequence[Tensor], group: list[int], side: str, run: Run, *, named: bool) -> Padded | None:
    seen = [_ragged(leaves[at], side) for at in group]
    found = hide(leaves, group, seen, run, named=named)
    if found is None:
        return None
    pairs = zip(found.outputs, found.moved, strict=True)
    told = [_told(x, y, seen, side) if found.passed else torch.isfinite(x) for x, y in pairs]
    return Padded(tuple(found.inputs), side, told)


def _ragged(mask: Tensor, side: str) -> Tensor:
    """Where rows of this shape, (B, N), have their tokens: fewer and fewer, at least half of them."""
    rows, length = mask.shape
    hidden = torch.tensor([[row * length // (2 * rows)] for row in range(rows)])
    at = torch.arange(length)
    return (at >= hidden if side == "left" else at < length - hidden).to(mask.device)


def _with_other_padding(inputs: Sequence[Tensor], group: Sequence[int], seen: Sequence[Tensor]) -> list[Tensor] | None:
    """The inputs with something else at padding, of what they hold elsewhere; None if there is nothing else."""
    found = list(inputs)
    for at, x in enumerate(inputs):
        for mask in seen:
            if at not in group and x.dim() > 1 and x.shape[:2] == mask.shape:
                hidden = ~mask.view(*mask.shape, *[1] * (x.dim() - 2))
                found[at] = torch.where(hidden, x.roll(1, 1), found[at])
    return found if any(not torch.equal(x, y) for x, y in zip(inputs, found, strict=True)) else None


def _passes_over(outputs: Sequence[Tensor], moved: Sequence[Tensor], seen: Tensor) -> bool:
    """Whether what is at padding makes no difference at tokens, where outputs are numbers."""
    pairs = list(zip(outputs, moved, strict=True))
    of_places = [(x[seen], y[seen]) for x, y in pairs if x.shape[:2] == seen.shape]
    return all(bool(torch.isfinite(x).all()) and difference(x, y) <= _UNMOVED for x, y in of_places or pairs)


def _told(x: Tensor, moved: Tensor, seen: Sequence[Tensor], side: str) -> Tensor:
    """Where an output says something. Of one with a value per place that is at tokens; of one per row, if the first
    place of each is a token; of others without an axis of places, wherever padding makes no difference."""
    kept = [mask for mask in seen if x.shape[:2] == mask.shape]
    if kept:
        tokens = torch.stack(kept).all(0).cpu()
        return tokens.view(*tokens.shape, *[1] * (x.dim() - 2)).expand(x.shape)
    if x.dim() <= 2:
        return torch.full(x.shape, side == "right")
    if any(mask.shape[1] in x.shape[1:] for mask in seen) or x.shape != moved.shape:
        return torch.zeros(x.shape, dtype=torch.bool)
    gap = torch.where(x == moved, 0, x.double() - moved.double()).abs()
    return torch.isfinite(x) & (gap <= _UNMOVED * max(1.0, float(x.double().nan_to_num().abs().max())))


__all__ = ["Hiding", "Padded", "groups", "hide", "padded"]
