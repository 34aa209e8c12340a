"""What the kernels of attention share: parts of operands, and scores with all that is added to them or left out.

Scores are in units of log 2, so that exp2 takes them. Every operand comes with its strides; queries of a group of heads
read the keys of the head that serves them, which are never repeated.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def place(x, batch, head):
    """Where a head of an operand begins."""
    return x.at + batch * x.batch + head * x.head


@triton.jit
def tile(base, x, tokens, channels, there, WIDTH: tl.constexpr, EVEN: tl.constexpr, CHECK: tl.constexpr):
    """Channels of some tokens, zero where there are none: (tokens, channels).

    ``there``: which tokens exist, asked only with CHECK; EVEN: all of the channels exist.
    """
    at = base + tokens[:, None] * x.token + channels[None, :] * x.channel
    if CHECK:
        mask = there[:, None] if EVEN else there[:, None] & (channels < WIDTH)[None, :]
        found = tl.load(at, mask=mask, other=0.0)
    elif EVEN:
        found = tl.load(at)
    else:
        found = tl.load(at, mask=(channels < WIDTH)[None, :], other=0.0)
    return found


@triton.jit
def put(base, x, tokens, channels, there, value, WIDTH: tl.constexpr):
    """Write channels of some tokens."""
    at = base + tokens[:, None] * x.token + channels[None, :] * x.channel
    tl.store(at, value.to(x.at.dtype.element_ty), mask=there[:, None] & (channels < WIDTH)[None, :])


@triton.jit
def openings(gate, batch, head, rows, channels, there, E: tl.constexpr, BE: tl.constexpr, PER_HEAD: tl.constexpr):
    """What was given for the gates of some queries, in float32: (rows, channels), or (rows, 1) of a gate PER_HEAD."""
    base = place(gate, batch, head)
    if PER_HEAD:
        found = tl.load(base + rows * gate.token, mask=there, other=0.0)[:, None]
    else:
        found = tile(base, gate, rows, channels, there, E, E == BE, True)
    return found.to(tl.float32)


@triton.jit
def tanh(x, EXACT: tl.constexpr):
    """tanh, which tl lacks, by a sigmoid. Near 0 that cancels to an absolute error of 1e-7: EXACT takes the series."""
    found = 2.0 * tl.sigmoid(2.0 * x) - 1.0
    if EXACT:
        s = x * x
        near = x * (1.0 - s * (0.3333333333 - s * (0.1333333333 - 0.05396825397 * s)))
        found = tl.where(tl.abs(x) < 0.1, near, found)
    return found


@triton.jit
def capped(found, rule, EXACT: tl.constexpr):
    """Products as scores, before anything is added: times a scale, and with a cap held below it by a tanh."""
    if rule.outer is None:
        found = found * rule.inner
    else:
        found = tanh(found * rule.inner, EXACT) * rule.outer
    return found


@triton.jit
def slope(found, rule):
    """The derivative of ``capped`` by its product, over its scale, from what it found."""
    ratio = found / rule.outer
    return 1.0 - ratio * ratio


@triton.jit
def biased(found, bias, bias_rows, rows, columns, end, rule, CHECK: tl.constexpr):
    """Scores with the bias, -inf where a query does not see a key.

    rows and columns: indices, of which one runs along each axis. bias_rows: where the rows of a head lie, for each of
    ``rows``. A bias of bytes is a mask. With CHECK it is asked who sees what, of the keys before ``end``.
    """
    if bias is not None:
        inside = (rows < rule.queries) & (columns < end)
        given = tl.load(bias.at + bias_rows + columns.to(tl.int64) * bias.channel, mask=inside, other=0)
        if bias.at.dtype.element_ty == tl.uint8:
            found = tl.where(given != 0, found, float("-inf"))
        else:
            found += given.to(tl.float32) * LOG2E
    if CHECK:
        seen = (rows < rule.queries) & (columns < end)
        if rule.left is not None:
            seen = seen & (columns >= rows + rule.offset - rule.left)
        if rule.right is not None:
            seen = seen & (columns <= rows + rule.offset + rule.right)
        found = tl.where(seen, found, float("-inf"))
    return found


@triton.jit
def row_places(x, batch, head, rows):
    """Where rows of a head lie in an operand of scores, if there is one."""
    found = rows.to(tl.int64)
    if x is not None:
        found = batch * x.batch + head * x.head + found * x.token
    return found


@triton.jit
def keys_of(first, count, listed, entry, BN: tl.constexpr, RATIO: tl.constexpr, rule):
    """The keys that ``count`` queries from ``first`` on see: where blocks of BN begin, where whole blocks begin and end
    of which every query sees every key, where the keys end. With a list the number of its turns stands third."""
    low, high, whole_low, whole_high = 0, rule.keys, 0, rule.keys
    if listed is not None:
        whole_high, high = tl.load(listed.counts + entry) * RATIO, 0
    else:
        if rule.left is not None:
            low = tl.minimum(tl.maximum(first + rule.offset - rule.left, 0), rule.keys)
            whole_low = tl.maximum(first + count - 1 + rule.offset - rule.left, 0)
        if rule.right is not None:
            high = tl.minimum(tl.maximum(first + count + rule.offset + rule.right, 0), rule.keys)
            whole_high = tl.minimum(tl.maximum(first + rule.offset + rule.right + 1, 0), rule.keys)
        low, whole_low, whole_high = in_blocks(low, whole_low, whole_high, high, BN)
    return low, whole_low, whole_high, high


@triton.jit
def queries_of(first, count, listed, entry, BM: tl.constexpr, RATIO: tl.constexpr, rule):
    """The same of ``count`` keys from ``first`` on, and the queries that see them, in blocks of BM."""
    low, high, whole_low, whole_high = 0, rule.queries, 0, rule.queries
    if listed is not None:
        whole_high, high = tl.load(listed.counts + entry) * RATIO, 0
    else:
        if rule.right is not None:
            low = tl.minimum(tl.maximum(first - rule.offset - rule.right, 0), rule.queries)
            whole_low = tl.maximum(first + count - 1 - rule.offset - rule.right, 0)
        if rule.left is not None:
            high = tl.minimum(tl.maximum(first + count - rule.offset + rule.left, 0), rule.queries)
            whole_high = tl.minimum(tl.maximum(first - rule.offset + rule.left + 1, 0), rule.queries)
        low, whole_low, whole_high = in_blocks(low, whole_low, whole_high, high, BM)
    return low, whole_low, whole_high, high


@triton.jit
def in_blocks(low, whole_low, whole_high, high, BLOCK: tl.constexpr):
    """Where blocks begin, and where the whole ones begin and end, inside of a range."""
    low = low // BLOCK * BLOCK
    whole_low = tl.maximum(tl.minimum(tl.cdiv(whole_low, BLOCK), tl.cdiv(high, BLOCK)) * BLOCK, low)
    return low, whole_low, tl.maximum(whole_high // BLOCK * BLOCK, whole_low)


@triton.jit
def entry_of(listed, batch, head, block):
    """Where the list of a block of a head begins, counted in lists; 0 if there are none."""
    found = block * 0
    if listed is not None:
        found = batch * listed.batch + head * listed.head + block
    return found


@triton.jit
def turns(start, whole_low, whole_high, end, listed, BLOCK: tl.constexpr, EDGES: tl.constexpr):
    """How many blocks there are at the edges of a range, where it must be asked who sees what, or inside of them. All
    of a list is edge."""
    if listed is not None:
        found = whole_high
    elif EDGES:
        found = (whole_low - start) // BLOCK + tl.cdiv(tl.maximum(end - whole_high, 0), BLOCK)
    else:
        found = (whole_high - whole_low) // BLOCK
    return found


@triton.jit
def block_at(
    turn, start, whole_low, whole_high, listed, entry, WHOLE: tl.constexpr, PART: tl.constexpr, EDGES: tl.constexpr
):
    """Where the block of a turn begins. Of a list of blocks of WHOLE each turn takes a part."""
    if listed is not None:
        index = tl.load(listed.indices + entry * listed.width + turn // (WHOLE // PART))
        found = index * WHOLE + turn % (WHOLE // PART) * PART
    elif EDGES:
        found = start + turn * PART
        found = tl.where(found < whole_low, found, found - whole_low + whole_high)
    else:
        found = whole_low + turn * PART
    return found


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation of a gate, on float32."""
    if NAME == "sigmoid":
        x = tl.sigmoid(x)
    elif NAME == "silu":
        x = x * tl.sigmoid(x)
    return x


@triton.jit
def steepness(x, NAME: tl.constexpr):
    """The derivative of ``activated``."""
    s = tl.sigmoid(x)
    if NAME == "sigmoid":
        found = s * (1.0 - s)
    elif NAME == "silu":
        found = s * (1.0 + x * (1.0 - s))
    else:
        found = x * 0.0 + 1.0
    return found
