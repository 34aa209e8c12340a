"""Multi-head latent attention (DeepSeek V2, 2024): queries, keys and values made of one stream in two steps each, the
first to fewer features. What such attention reads is the stream, not the latent values between."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from gatecc.ir.match.attention.origins import Tracer
from gatecc.ir.match.attention.streams import Operand

Operands = tuple[Operand, Operand, Operand]


def from_one_stream(operands: Operands, trace: Tracer, within: str) -> Operands:
    """The operands as read from the stream that all of them start from, where that is not what the last projections
    read. No one matrix makes them of it, so they have no weight.
    """
    q, k, v = operands
    queries, keys = q.origins, k.origins or v.origins
    if queries is None or keys is None or queries.others or keys.others:
        return operands
    if queries.projection.x is keys.projection.x:
        return operands
    starts = trace.starts(keys.projection, within)
    stream = next((n for n in trace.starts(queries.projection, within) if n in starts), None)
    return operands if stream is None else (_read(q, stream), _read(k, stream), _read(v, stream))


def _read(operand: Operand, stream: fx.Node) -> Operand:
    """An operand as read from the stream; one that stays without origins has no projection of its own."""
    origins = operand.origins
    if origins is None or origins.projection.x is stream:
        return operand
    made = replace(origins.projection, x=stream, inp=stream, weight=None)
    return replace(operand, origins=replace(origins, projection=made))
