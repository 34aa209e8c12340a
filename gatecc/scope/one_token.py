"""One token: an example that holds a single token does not show whether attention is causal; a longer one does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import nn

from gatecc.capture import capture
from gatecc.capture.signature import OpaqueArgumentError, map_tensors
from gatecc.errors import CaptureError
from gatecc.ir.mask import Mask
from gatecc.ir.site import Attention, Site
from gatecc.pipeline import prepare
from gatecc.scope.masks import UNTOLD, one_token

_TOKENS = 3


def with_longer_masks(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], sites: Sequence[Site]
) -> list[Site]:
    """The sites of a model's graph, with the masks that the same inputs with more tokens prove where these hold one.

    Tokens are the second axis of inputs (B, 1) and (B, 1, C). Where the model does not run on more of them, the masks
    are unknown.
    """
    longer = _longer(args, kwargs) if any(map(_open, sites)) else None
    if longer is None:
        return list(sites)
    known = _masks(model, *longer)
    return [replace(s, mask=known.get(s.key, UNTOLD)) if _open(s) else s for s in sites]


def _open(site: Site) -> TypeGuard[Attention]:
    return isinstance(site, Attention) and site.mask.kind == "bidirectional" and not site.cross and one_token(site)


def _longer(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """The inputs with their token repeated; None if no input holds one."""
    found: list[torch.Tensor] = []

    def repeated(x: torch.Tensor) -> torch.Tensor:
        if x.dim() not in (2, 3) or x.size(1) != 1 or x.is_floating_point() != (x.dim() == 3):
            return x
        found.append(x)
        return x.repeat_interleave(_TOKENS, 1)

    try:
        made: tuple[tuple[Any, ...], dict[str, Any]] = map_tensors(repeated, (args, kwargs))
    except OpaqueArgumentError:
        return None
    return made if found else None


def _masks(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Mask]:
    """The masks of the attention sites by their keys; none if the model cannot be captured so."""
    try:
        program = capture(model, args, kwargs)
    except CaptureError:
        return {}
    return {s.key: s.mask for s in prepare(program).found if isinstance(s, Attention)}
