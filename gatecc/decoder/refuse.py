"""Refusals of the decoder: every one names the node, its module and its source line."""

from __future__ import annotations

from torch import fx

from gatecc.errors import DecoderError
from gatecc.ir.graphview import target_name
from gatecc.ir.program import origin


def refusal(node: fx.Node, reason: str, do: str = "") -> DecoderError:
    """The error that says why ``node`` has no step; the caller raises it."""
    place = origin(node)
    return DecoderError(
        f"no decode step can be derived: {reason}",
        where=f"{place.owner or '(model)'} {place.line}".strip(),
        found=f"{node.name} = {target_name(node.target)}",
        do=do,
    )
