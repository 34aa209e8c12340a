"""Attention of a block of queries: keys go by in blocks, and no score is ever written (Dao et al. 2022)."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.attention.triton.kernels.tiles import (
    LN2,
    LOG2E,
    activated,
    biased,
    block_at,
    capped,
    entry_of,
    keys_of,
    openings,
    place,
    put,
    row_places,
    tile,
    turns,
)


@triton.jit
def absorb(
    peak,
    total,
    sums,
    query,
    k,
    v,
    key_base,
    value_base,
    bias,
    bias_rows,
    rows,
    first,
    end,
    rule,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """A block of keys more, of those before ``end``.

    peak: the largest score so far; total: the sum of exp2 of scores, less the peak; sums: that of the values.
    """
    columns = first + tl.arange(0, BN)
    key = tile(key_base, k, columns, tl.arange(0, BD), columns < end, D, D == BD, CHECK)
    found = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION), rule, key.dtype == tl.float32)
    found = biased(found, bias, bias_rows[:, None], rows[:, None], columns[None, :], end, rule, CHECK)
    higher = tl.maximum(peak, tl.max(found, 1))
    level = tl.where(higher == float("-inf"), 0.0, higher)  # a query that sees nothing yet
    weights, kept = tl.exp2(found - level[:, None]), tl.exp2(peak - level)
    value = tile(value_base, v, columns, tl.arange(0, BE), columns < end, E, E == BE, CHECK)
    sums = tl.dot(weights.to(value.dtype), value, sums * kept[:, None], input_precision=PRECISION)
    return higher, total * kept + tl.sum(weights, 1), sums


@triton.jit
def attended(
    q,
    k,
    v,
    bias,
    sinks,
    listed,
    rule,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LIST_Q: tl.constexpr,
    LIST_K: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a program has of softmax(scores) v: batch, head, rows, which of these there are, their values (BM, BE), and
    of their scores the largest and the sum of exp2, less it.

    ``listed``: which blocks of LIST_K keys each block of LIST_Q queries reads; None for all.
    """
    blocks = tl.cdiv(rule.queries, BM)
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // blocks // rule.heads, program // blocks % rule.heads
    first_row = (blocks - 1 - (program % blocks).to(tl.int32)) * BM  # the longest rows of a causal mask begin
    rows = first_row + tl.arange(0, BM)
    there = rows < rule.queries
    key_base, value_base = place(k, batch, head // rule.group), place(v, batch, head // rule.group)
    query = tile(place(q, batch, head), q, rows, tl.arange(0, BD), there, D, D == BD, True)
    bias_rows = row_places(bias, batch, head, rows)
    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    sums = tl.zeros((BM, BE), tl.float32)
    if sinks is not None:
        peak = total + tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    entry = entry_of(listed, batch, head, first_row // LIST_Q)
    start, whole_low, whole_high, end = keys_of(first_row, BM, listed, entry, BN, LIST_K // BN, rule)
    for edges in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        if edges or listed is None:
            for turn in range(turns(start, whole_low, whole_high, end, listed, BN, edges)):
                peak, total, sums = absorb(
                    peak, total, sums, query, k, v, key_base, value_base, bias, bias_rows, rows,
                    block_at(turn, start, whole_low, whole_high, listed, entry, LIST_K, BN, edges), rule.keys, rule,
                    D, E, BD, BE, BN, edges, PRECISION,
                )  # fmt: skip
    sums = sums / tl.where(total == 0.0, 1.0, total)[:, None]
    return batch, head, rows, there, sums, peak, total


@triton.jit
def attend(
    q,
    k,
    v,
    bias,
    sinks,
    gate,
    out,
    logsumexp,
    listed,
    rule,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LIST_Q: tl.constexpr,
    LIST_K: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """out = gate * softmax(scores) v and the logsumexp of the scores, for a block of queries of one head. PER_HEAD: the
    gate has one channel."""
    batch, head, rows, there, sums, peak, total = attended(
        q, k, v, bias, sinks, listed, rule, D, E, BD, BE, BM, BN, LIST_Q, LIST_K, PRECISION
    )
    if gate is not None:
        given = openings(gate, batch, head, rows, tl.arange(0, BE), there, E, BE, PER_HEAD)
        sums *= activated(given, ACTIVATION)
    put(place(out, batch, head), out, rows, tl.arange(0, BE), there, sums, E)
    places = (batch * rule.heads + head) * rule.queries + rows
    tl.store(logsumexp + places, (peak + tl.log2(total)) * LN2, mask=there)
