"""Gradients of attention. Weights are computed again from the logsumexp; each program sums what it writes in one order,
without atomics, so that the same call gives the same bits (Dao 2023, FlashAttention-2, has the sums)."""

from __future__ import annotations

import triton
import triton.language as tl

from gatecc.ops.attention.triton.kernels.tiles import (
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
    queries_of,
    row_places,
    slope,
    steepness,
    tile,
    turns,
)


@triton.jit
def weigh(
    out,
    grad,
    gate,
    grad_logsumexp,
    opened,
    deltas,
    rule,
    E: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    PER_HEAD: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """deltas, (B, H, N): what the gradients of a query's scores have in common, out · grad less the gradient of the
    logsumexp. With a gate also the gradient of what comes before it, ``opened``."""
    blocks = tl.cdiv(rule.queries, BM)
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // blocks // rule.heads, program // blocks % rule.heads
    rows = (program % blocks).to(tl.int32) * BM + tl.arange(0, BM)
    there, channels = rows < rule.queries, tl.arange(0, BE)
    g = tile(place(grad, batch, head), grad, rows, channels, there, E, E == BE, True).to(tl.float32)
    o = tile(place(out, batch, head), out, rows, channels, there, E, E == BE, True).to(tl.float32)
    places = (batch * rule.heads + head) * rule.queries + rows
    found = tl.sum(g * o, 1)
    if grad_logsumexp is not None:
        found -= tl.load(grad_logsumexp + places, mask=there, other=0.0).to(tl.float32)
    tl.store(deltas + places, found, mask=there)
    if gate is not None:
        x = openings(gate, batch, head, rows, channels, there, E, BE, PER_HEAD)
        put(place(opened, batch, head), opened, rows, channels, there, g * activated(x, ACTIVATION), E)


@triton.jit
def levels(logsumexp, deltas, places, there):
    """Logsumexps in units of log 2, 0 of a query that sees nothing, and what ``weigh`` found."""
    found = tl.load(logsumexp + places, mask=there, other=0.0) * LOG2E
    return tl.where(found == float("-inf"), 0.0, found), tl.load(deltas + places, mask=there, other=0.0)


@triton.jit
def of_queries(
    dquery,
    heads,
    query,
    g,
    level,
    delta,
    k,
    v,
    key_base,
    value_base,
    bias,
    bias_rows,
    rows,
    first,
    dgate,
    rule,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BN: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a block of keys adds to dq, over its scale, and if a gate's gradient is wanted to the heads before it."""
    columns = first + tl.arange(0, BN)
    key = tile(key_base, k, columns, tl.arange(0, BD), columns < rule.keys, D, D == BD, CHECK)
    value = tile(value_base, v, columns, tl.arange(0, BE), columns < rule.keys, E, E == BE, CHECK)
    plain = capped(tl.dot(query, tl.trans(key), input_precision=PRECISION), rule, key.dtype == tl.float32)
    found = biased(plain, bias, bias_rows[:, None], rows[:, None], columns[None, :], rule.keys, rule, CHECK)
    weights = tl.exp2(found - level[:, None])
    ds = weights * (tl.dot(g, tl.trans(value), input_precision=PRECISION) - delta[:, None])
    if rule.outer is not None:
        ds *= slope(plain, rule)
    dquery = tl.dot(ds.to(key.dtype), key, dquery, input_precision=PRECISION)
    if dgate is not None:
        heads = tl.dot(weights.to(value.dtype), value, heads, input_precision=PRECISION)
    return dquery, heads


@triton.jit
def differentiate_queries(
    q,
    k,
    v,
    bias,
    gate,
    grad,
    opened,
    logsumexp,
    deltas,
    dq,
    dgate,
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
    """dq, and the gradient of the gate, of a block of queries of one head. ``opened`` is the gradient of what comes
    before the gate, ``grad`` that of the result; PER_HEAD: the gate has one channel."""
    blocks = tl.cdiv(rule.queries, BM)
    program = tl.program_id(0).to(tl.int64)
    batch, head = program // blocks // rule.heads, program // blocks % rule.heads
    first_row = (blocks - 1 - (program % blocks).to(tl.int32)) * BM
    rows = first_row + tl.arange(0, BM)
    there, channels = rows < rule.queries, tl.arange(0, BE)
    key_base, value_base = place(k, batch, head // rule.group), place(v, batch, head // rule.group)
    query = tile(place(q, batch, head), q, rows, tl.arange(0, BD), there, D, D == BD, True)
    g = tile(place(opened, batch, head), opened, rows, channels, there, E, E == BE, True)
    places = (batch * rule.heads + head) * rule.queries + rows
    level, delta = levels(logsumexp, deltas, places, there)
    bias_rows = row_places(bias, batch, head, rows)
    dquery = tl.zeros((BM, BD), tl.float32)
    heads = tl.zeros((BM, BE), tl.float32)
    entry = entry_of(listed, batch, head, first_row // LIST_Q)
    start, whole_low, whole_high, end = keys_of(first_row, BM, listed, entry, BN, LIST_K // BN, rule)
    for edges in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
        if edges or listed is None:
            for turn in range(turns(start, whole_low, whole_high, end, listed, BN, edges)):
                dquery, heads = of_queries(
                    dquery, heads, query, g, level, delta, k, v, key_base, value_base, bias, bias_rows, rows,
                    block_at(turn, start, whole_low, whole_high, listed, entry, LIST_K, BN, edges), dgate, rule,
                    D, E, BD, BE, BN, edges, PRECISION,
                )  # fmt: skip
    put(place(dq, batch, head), dq, rows, tl.arange(0, BD), there, dquery * rule.scale, D)
    if dgate is not None:
        given = tile(place(grad, batch, head), grad, rows, channels, there, E, E == BE, True).to(tl.float32)
        x = openings(gate, batch, head, rows, channels, there, E, BE, PER_HEAD)
        found = given * heads * steepness(x, ACTIVATION)
        base = place(dgate, batch, head)
        if PER_HEAD:
            tl.store(base + rows * dgate.token, tl.sum(found, 1).to(dgate.at.dtype.element_ty), mask=there)
        else:
            put(base, dgate, rows, channels, there, found, E)


@triton.jit
def of_keys(
    dkey,
    dvalue,
    key,
    value,
    q,
    opened,
    logsumexp,
    deltas,
    bias,
    batch,
    head,
    columns,
    first,
    rule,
    D: tl.constexpr,
    E: tl.constexpr,
    BD: tl.constexpr,
    BE: tl.constexpr,
    BM: tl.constexpr,
    CHECK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """What a block of queries adds to dk, over its scale, and dv. Scores stand on their side: (keys, queries)."""
    rows = first + tl.arange(0, BM)
    there = rows < rule.queries
    query = tile(place(q, batch, head), q, rows, tl.arange(0, BD), there, D, D == BD, CHECK)
    g = tile(place(opened, batch, head), opened, rows, tl.arange(0, BE), there, E, E == BE, CHECK)
    level, delta = levels(logsumexp, deltas, (batch * rule.heads + head) * rule.queries + rows, there)
    bias_rows = row_places(bias, batch, head, rows)
    plain = capped(tl.dot(key, tl.trans(query), input_precision=PRECISION), rule, key.dtype == tl.float32)
    found = biased(plain, bias, bias_rows[None, :], rows[None, :], columns[:, None], rule.keys, rule, CHECK)
    weights = tl.exp2(found - level[None, :])
    dvalue = tl.dot(weights.to(g.dtype), g, dvalue, input_precision=PRECISION)
    ds = weights * (tl.dot(value, tl.trans(g), input_precision=PRECISION) - delta[None, :])
    if rule.outer is not None:
        ds *= slope(plain, rule)
    return tl.dot(ds.to(query.dtype), query, dkey, input_precision=PRECISION), dvalue


@triton.jit
def differentiate_keys(
    q,
    k,
    v,
    bias,
    opened,
    logsumexp,
    deltas,
    dk,
    dv,
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
    """dk and dv of a block of keys, summed over the heads that they serve. ``listed``: which blocks of queries read
    each block of keys."""
    blocks, served_heads = tl.cdiv(rule.keys, BN), rule.heads // rule.group
    program = tl.program_id(0).to(tl.int64)
    batch, served = program // blocks // served_heads, program // blocks % served_heads
    first_column = (program % blocks).to(tl.int32) * BN
    columns = first_column + tl.arange(0, BN)
    there, channels = columns < rule.keys, tl.arange(0, BE)
    key = tile(place(k, batch, served), k, columns, tl.arange(0, BD), there, D, D == BD, True)
    value = tile(place(v, batch, served), v, columns, channels, there, E, E == BE, True)
    dkey = tl.zeros((BN, BD), tl.float32)
    dvalue = tl.zeros((BN, BE), tl.float32)
    for i in range(rule.group):
        head = served * rule.group + i
        entry = entry_of(listed, batch, head, first_column // LIST_K)
        start, whole_low, whole_high, end = queries_of(first_column, BN, listed, entry, BM, LIST_Q // BM, rule)
        for edges in tl.static_range(2):  # pyright: ignore[reportGeneralTypeIssues]
            if edges or listed is None:
                for turn in range(turns(start, whole_low, whole_high, end, listed, BM, edges)):
                    dkey, dvalue = of_keys(
                        dkey, dvalue, key, value, q, opened, logsumexp, deltas, bias, batch, head, columns,
                        block_at(turn, start, whole_low, whole_high, listed, entry, LIST_Q, BM, edges), rule,
                        D, E, BD, BE, BM, edges, PRECISION,
                    )  # fmt: skip
    put(place(dk, batch, served), dk, columns, tl.arange(0, BD), there, dkey * rule.scale, D)
    put(place(dv, batch, served), dv, columns, channels, there, dvalue, E)


@triton.jit
def opened_to(flags, batch, head, row, column):
    """Whether a block of queries reads a block of keys; all do without a map."""
    found = row >= 0
    if flags is not None:
        found = tl.load(place(flags, batch, head) + row * flags.token + column * flags.channel) != 0
    return found


@triton.jit
def products(
    x,
    y,
    batch,
    head,
    served,
    rows,
    columns,
    seen,
    there,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """x y^T of some rows of one head and some of another, with few channels at once: (rows, columns)."""
    found = tl.zeros((rows.shape[0], columns.shape[0]), tl.float32)
    left, right = place(x, batch, head), place(y, batch, served)
    for first in range(0, WIDTH, CHUNK):
        channels = first + tl.arange(0, CHUNK)
        a = tile(left, x, rows, channels, seen, WIDTH, WIDTH % CHUNK == 0, True)
        b = tile(right, y, columns, channels, there, WIDTH, WIDTH % CHUNK == 0, True)
        found = tl.dot(a, tl.trans(b), found, input_precision=PRECISION)
    return found


@triton.jit
def differentiate_bias(
    q,
    k,
    v,
    bias,
    opened,
    logsumexp,
    deltas,
    dbias,
    flags,
    rule,
    batches,
    heads,
    D: tl.constexpr,
    E: tl.constexpr,
    CHUNK: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LIST_Q: tl.constexpr,
    LIST_K: tl.constexpr,
    PER_QUERY: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of a block of the bias, summed over what shares it: ``batches``, ``heads``, and unless PER_QUERY all
    queries. ``flags``: which blocks of queries read which blocks of keys."""
    across = tl.cdiv(rule.keys, BN)
    down = tl.cdiv(rule.queries, BM) if PER_QUERY else 1
    program = tl.program_id(0).to(tl.int64)
    first_column = (program % across).to(tl.int32) * BN
    first_row = (program // across % down).to(tl.int32) * BM
    own = program // across // down  # of the bias: a head of a batch
    own_heads = rule.heads // heads
    columns = first_column + tl.arange(0, BN)
    there = columns < rule.keys
    start, whole_low, whole_high, end = queries_of(first_column, BN, None, 0, BM, 1, rule)
    start, end = tl.minimum(start, whole_low), tl.maximum(whole_high, end)
    if PER_QUERY:
        end = tl.where(first_row < start, first_row, tl.minimum(end, first_row + 1))
        start = first_row
    found = tl.zeros((BM, BN), tl.float32)
    for n in range(batches * heads):
        batch, head = own // own_heads * batches + n // heads, own % own_heads * heads + n % heads
        for first in range(start, end, BM):
            rows = first + tl.arange(0, BM)
            keep = opened_to(flags, batch, head, first // LIST_Q, first_column // LIST_K)
            seen, open_keys = (rows < rule.queries) & keep, there & keep
            plain = products(q, k, batch, head, head // rule.group, rows, columns, seen, open_keys, D, CHUNK, PRECISION)
            plain = capped(plain, rule, q.at.dtype.element_ty == tl.float32)
            bias_rows = row_places(bias, batch, head, rows)
            scores = biased(plain, bias, bias_rows[:, None], rows[:, None], columns[None, :], rule.keys, rule, True)
            level, delta = levels(logsumexp, deltas, (batch * rule.heads + head) * rule.queries + rows, seen)
            weights = tl.where(seen[:, None], tl.exp2(scores - level[:, None]), 0.0)
            gains = products(
                opened, v, batch, head, head // rule.group, rows, columns, seen, open_keys, E, CHUNK, PRECISION
            )
            found += weights * (gains - delta[:, None])
    base = place(dbias, own // own_heads, own % own_heads)
    if PER_QUERY:
        rows = first_row + tl.arange(0, BM)
        put(base, dbias, rows, columns, rows < rule.queries, found, rule.keys)
    else:
        tl.store(base + columns * dbias.channel, tl.sum(found, 0).to(dbias.at.dtype.element_ty), mask=there)
