"""Naming what one evaluation of a mask shows."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from gatecc.ir.mask import Mask

_STEP, _GAP, _LEVELS = 25.0, 3, 1 << 16  # scores more than 50 below all others are masked: exp(-50) is 2e-22
_NOTHING = -1000.0  # no best score is this low unless all are masked


@dataclass(frozen=True)
class View:
    """What one evaluation shows. visible: (..., n, m) bool; bias: whether visible scores differ from zero."""

    visible: torch.Tensor
    bias: bool


def read(scores: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Which keys additive scores (or a boolean mask) leave visible, and whether they bias these.

    Masked scores lie below a gap: a bias that grows with distance (ALiBi) fills the values between, a mask does not.
    """
    if scores.dtype == torch.bool:
        return scores, False
    scores = scores.double().nan_to_num(nan=-torch.inf, neginf=-torch.inf)
    if float(scores.max()) < _NOTHING:
        return torch.zeros_like(scores, dtype=torch.bool), False
    level = ((scores.max() - scores) / _STEP).clamp(max=_LEVELS).long()
    used = torch.bincount(level.flatten(), minlength=_LEVELS + 1).nonzero().flatten()
    gap = (used.diff() >= _GAP).nonzero().flatten()
    visible = level <= used[gap[0]] if len(gap) else torch.ones_like(level, dtype=torch.bool)
    return visible, bool((scores[visible] != 0).any())


def pattern(view: View) -> Mask:
    """Name the pattern of one evaluation."""
    rows = view.visible.reshape(-1, *view.visible.shape[-2:])
    if not bool((rows == rows[:1]).all()):
        return Mask("unknown", bias=view.bias, reason="it differs between samples, heads or windows")
    one = rows[0]
    queries, keys = one.shape
    if not bool(one.any()):
        return Mask("unknown", reason="it hides everything")
    if bool(one.all()):
        return Mask("bidirectional", bias=view.bias)
    distance = torch.arange(queries)[:, None] - torch.arange(keys)
    if queries == keys and torch.equal(one, distance >= 0):
        return Mask("causal", bias=view.bias)
    width = int(one[-1].sum())
    if queries == keys and torch.equal(one, (distance >= 0) & (distance < width)):
        return Mask("sliding_window", window=width, bias=view.bias)
    if queries == keys and torch.equal(one, distance.abs() < width):
        return Mask("unknown", bias=view.bias, reason=f"a window of {width - 1} keys to either side")
    return Mask("unknown", bias=view.bias, reason="a pattern without a name")


def agree(masks: list[Mask]) -> Mask:
    """The mask that all evaluations show. A window that is wider than a small size looks causal there."""
    unknown = next((m for m in masks if m.kind == "unknown"), None)
    if unknown is not None:
        return unknown
    kinds, windows = {m.kind for m in masks}, {m.window for m in masks} - {None}
    some = {name: any(getattr(m, name) for m in masks) for name in ("padding", "both", "bias")}
    merged = replace(masks[-1], **some)
    if len(windows) == 1 and kinds <= {"causal", "sliding_window"}:
        return replace(merged, kind="sliding_window", window=windows.pop())
    if len(kinds) == 1 and not windows:
        return merged
    return Mask("unknown", reason=f"it changes its kind with the length: {', '.join(map(str, masks))}")
