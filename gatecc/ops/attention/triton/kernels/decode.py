"""Attention of few queries over many keys, as in a step of a decoder: keys are split, and each program takes a part of
them for all heads that read it; what the parts found is joined (Dao et al. 2023, Flash-Decoding)."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.attention.triton.kernels.forward import absorb
from gatecc.ops.attention.triton.kernels.tiles import (
    LN2,
    LOG2E,
    activated,
    block_at,
    entry_of,
    keys_of,
    place,
    row_places,
)


@triton.jit
def attend_part(
    q,
    k,
    v,
    bias,
    found,
    peaks,
    listed,
    rule,
    splits,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LIST_K: tl.constexpr,
    TOGETHER: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What one part of the keys gives to all queries of TOGETHER heads: found, (B, H, N, splits, E), and the logsumexp
    of the part in units of log 2, ``peaks``, (B, H, N, splits)."""
    program = tl.program_id(0).to(tl.int64)
    split, owner = (program % splits).to(tl.int32), program // splits
    owners = rule.heads // TOGETHER
    batch, first_head = owner // owners, owner % owners * TOGETHER
    row = tl.arange(0, BM)
    there = row < TOGETHER * rule.queries
    head = first_head + tl.minimum(row // rule.queries, TOGETHER - 1)
    rows = row % rule.queries
    channels = tl.arange(0, BD)
    at = batch * q.batch + head[:, None] * q.head + rows[:, None] * q.token + channels[None, :] * q.channel
    query = tl.load(q.at + at, mask=there[:, None] & (channels < D)[None, :], other=0.0)
    key_base, value_base = place(k, batch, first_head // rule.group), place(v, batch, first_head // rule.group)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BE), tl.float32)
    entry = entry_of(listed, batch, first_head, 0)
    start, _, whole_high, end = keys_of(0, rule.queries, listed, entry, BN, LIST_K // BN, rule)
    if listed is None:
        each = tl.cdiv(tl.cdiv(tl.maximum(end - start, 0), BN), splits) * BN
        low = start + split * each
        high = tl.minimum(end, low + each)
        end = high
    else:
        each = tl.cdiv(whole_high, splits)
        low = split * each
        high = tl.minimum(whole_high, low + each)
        end = rule.keys
    bias_rows = row_places(bias, batch, head, rows)
    for turn in range(low, high, BN if listed is None else 1):
        first = turn if listed is None else block_at(turn, 0, 0, 0, listed, entry, LIST_K, BN, True)
        peak, total, sums = absorb(
            peak, total, sums, query, k, v, key_base, value_base, bias, bias_rows, rows, first, end, rule,
            D, E, BD, BE, BN, True, PRECISION,
        )  # fmt: skip
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    places = ((batch * rule.heads + head) * rule.queries + rows) * splits + split
    tl.store(peaks + places, peak + tl.log2(total), mask=there)
    values = tl.arange(0, BE)
    tl.store(found + places[:, None] * E + values[None, :], sums, mask=there[:, None] & (values < E)[None, :])


@triton.jit
def join(
    found,
    peaks,
    sinks,
    gate,
    out,
    logsumexp,
    rule,
    splits,
    E: tl.constexpr,
    BE: tl.constexpr,
    SPLITS: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """The parts of one query of one head as one, with the sink, and through the gate."""
    program = tl.program_id(0).to(tl.int64)
    row, owner = program % rule.queries, program // rule.queries
    batch, head = owner // rule.heads, owner % rule.heads
    part, values = tl.arange(0, SPLITS), tl.arange(0, BE)
    level = tl.load(peaks + program * splits + part, mask=part < splits, other=float("-inf"))
    peak, sink = tl.max(level, 0), float("-inf")
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    base = tl.where(peak == float("-inf"), 0.0, peak)
    weights = tl.exp2(level - base)
    total = tl.sum(weights, 0)
    if sinks is not None:
        total += tl.exp2(sink - base)
    there = (part < splits)[:, None] & (values < E)[None, :]
    parts = tl.load(found + (program * splits + part)[:, None] * E + values[None, :], mask=there, other=0.0)
    joined = tl.sum(parts * weights[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    if gate is not None:
        at = place(gate, batch, head) + row * gate.token + values * gate.channel
        joined *= activated(tl.load(at, mask=values < E, other=0.0).to(tl.float32), ACTIVATION)
    at = place(out, batch, head) + row * out.token + values * out.channel
    tl.store(at, joined.to(out.at.dtype.element_ty), mask=values < E)
    tl.store(logsumexp + program, (base + tl.log2(total)) * LN2)
