"""The cache of attention to chosen blocks, and a step that reads those alone.

keys, values   (B, K, C, D) and (B, K, C, E), with room for more; C counts whole blocks
features       (B, K, C / block, R) in float32: of the whole blocks, what the gate scores
running        (B, K, 1, 3 D + 1): of the block that is not whole yet sum, maximum, minimum and number of tokens
valid          (B, C): which are no padding
length         (1,): the number of tokens
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from gatecc.ops.block_gate.reference import filled, turned
from gatecc.ops.chosen_blocks.formula import Result, choice, logits, over, seen


def one_token(*tensors: Tensor | None, **options: Any) -> Result:
    """The operator for one token in a decoder, which sees to it that nobody else holds the memory behind the tokens of
    its cache."""
    return advance(*tensors, **options, in_place=True)


def advance(
    q: Any,
    k: Any,
    v: Any,
    q_raw: Any,
    k_raw: Any,
    query: Any,
    key: Any,
    cut: Any,
    keep: Any = None,
    *cache: Any,
    block: int,
    scale: float,
    base: float = 0.0,
    ranked: bool = True,
    spread: bool = False,
    in_place: bool = False,
) -> Result:
    """Attend with new tokens to what is held and to them, and hold them behind it. What padding gets is of no use."""
    keys, values, features, running, valid, length = cache
    start, new = int(length), q.size(2)
    end = start + new
    keys, values, valid = _grown((keys, values, valid), (2, 2, 1), start, end, block, in_place)
    (features,) = _grown((features,), (2,), start // block, end // block, 1, in_place)
    keys[:, :, start:end], values[:, :, start:end] = k, v
    valid[:, start:end] = True if keep is None else keep
    if new == 1 and ranked and keep is None:  # nothing is padding
        running = _one_more(features, running, k_raw, key, start, block, base)
        out = _ranked(q, keys, values, q_raw, query, features, float(cut), start, block, scale, base)
        return out, keys, values, features, running, valid, torch.tensor([end])
    running = _pooled(features, running, k_raw, valid, key, start, block, base)
    own = torch.arange(start, end, device=q.device) // block
    blocks = -(-end // block)
    there = filled(valid[:, :end], block)
    scores = logits(q_raw, query, features[:, :, : end // block], own, block, base)
    scores = torch.nn.functional.pad(scores, (0, blocks - scores.size(3)))
    chosen = choice(scores, cut, there, own, ranked)
    if new == 1:
        out = _gathered(q, keys, values, valid, chosen[:, :, 0], end, block, scale)
    else:
        mask = seen(chosen, start, valid[:, :end], end, block)
        out = over(q, keys[:, :, :end], values[:, :, :end], mask, scale)
    return out, keys, values, features, running, valid, torch.tensor([end])


def _ranked(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    q_raw: Tensor,
    query: Tensor,
    features: Tensor,
    cut: float,
    start: int,
    block: int,
    scale: float,
    base: float,
) -> Tensor:
    """One token, all of whose heads keep the same number of blocks: its own comes last, so that nothing is masked."""
    B, K, C, _ = keys.shape
    own = start // block
    count = min(max(math.ceil((own + 1) * cut - 1e-4), 2 if own else 1), own + 1)
    asked = q.reshape(B, K, -1, q.size(3))  # the heads of a group as queries of one head
    if count == own + 1:
        picked = keys[:, :, : start + 1], values[:, :, : start + 1]
    else:
        mean = q_raw.unflatten(1, (K, -1)).float().mean(2) if q_raw.size(1) > K else q_raw.float()
        scores = _at(mean @ query.float(), own * block, base) @ features[:, :, :own].mT
        scores[..., 0] = math.inf
        at = torch.nn.functional.pad(scores.topk(count - 1).indices[:, :, 0], (0, 1), value=own)
        rows = (at + _first_rows(B, K, C // block, q.device)).flatten()
        end = (count - 1) * block + start + 1 - own * block
        picked = _rows(keys, rows, count, block)[:, :, :end], _rows(values, rows, count, block)[:, :, :end]
    out = torch.nn.functional.scaled_dot_product_attention(asked, picked[0], picked[1], scale=scale)
    return out.reshape(B, -1, 1, values.size(3))


def _rows(x: Tensor, rows: Tensor, count: int, block: int) -> Tensor:
    """``count`` blocks of each sample and head. (B, K, C, D) -> (B, K, count * block, D)"""
    flat = x.view(-1, block * x.size(3)).index_select(0, rows)
    return flat.view(*x.shape[:2], count * block, x.size(3))


@lru_cache(maxsize=8)
def _first_rows(B: int, K: int, blocks: int, device: torch.device) -> Tensor:
    """Where the blocks of each sample and head begin, (B, K, 1)."""
    return torch.arange(B * K, device=device).view(B, K, 1) * blocks


def _at(x: Tensor, place: int, base: float) -> Tensor:
    """The rotary embedding at one place."""
    if not base or not place:
        return x
    cos, sin = _angles(place, base, x.size(3) // 2, x.device)
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


@lru_cache(maxsize=64)
def _angles(place: int, base: float, half: int, device: torch.device) -> tuple[Tensor, Tensor]:
    angles = place * base ** (-torch.arange(half, device=device, dtype=torch.float32) / half)
    return angles.cos(), angles.sin()


def _one_more(
    features: Tensor, running: Tensor, k_raw: Tensor, key: Tensor, start: int, block: int, base: float
) -> Tensor:
    """`_pooled` of one token that is no padding."""
    x, width = k_raw.float(), k_raw.size(3)
    if start % block == 0:
        total, largest, smallest = x, x, x
    else:
        total, largest, smallest, _ = running.split([width, width, width, 1], -1)
        total, largest, smallest = total + x, torch.maximum(largest, x), torch.minimum(smallest, x)
    number = start % block + 1
    if number == block:
        pools = torch.cat((total / block, largest, smallest), -1)
        features[:, :, start // block] = _at(pools @ key.float(), start + 1 - block, base)[:, :, 0]
    return torch.cat((total, largest, smallest, total.new_full((*total.shape[:3], 1), number)), -1)


def _gathered(
    q: Tensor, keys: Tensor, values: Tensor, valid: Tensor, chosen: Tensor, end: int, block: int, scale: float
) -> Tensor:
    """One token over its blocks. q: (B, H, 1, D), chosen: (B, K, n) -> (B, H, 1, E)"""
    B, K, C, _ = keys.shape
    count = int(chosen.sum(-1).max())
    asked = q.reshape(B, K, -1, q.size(3))  # the heads of a group as queries of one head
    if count == chosen.size(2):
        places = torch.arange(end, device=q.device)
        mask = chosen.unsqueeze(-1).expand(-1, -1, -1, block).flatten(2)[:, :, :end] & valid[:, None, :end]
        mask = mask | (places == end - 1)
        picked = keys[:, :, :end], values[:, :, :end]
    else:
        at = chosen.int().sort(dim=-1, descending=True, stable=True).indices[..., :count]  # (B, K, m)
        base = torch.arange(B * K, device=q.device).view(B, K, 1) * (C // block)
        rows = (at + base).flatten()
        picked = _rows(keys, rows, count, block), _rows(values, rows, count, block)
        places = (at.unsqueeze(-1) * block + torch.arange(block, device=q.device)).flatten(2)
        samples = torch.arange(B, device=q.device).view(B, 1, 1)
        mask = chosen.gather(2, at).repeat_interleave(block, 2) & (places < end) & valid[samples, places]
        mask = mask | (places == end - 1)
    out = torch.nn.functional.scaled_dot_product_attention(asked, picked[0], picked[1], mask.unsqueeze(2), scale=scale)
    return out.reshape(B, -1, 1, values.size(3))


def _pooled(
    features: Tensor, running: Tensor, k_raw: Tensor, valid: Tensor, key: Tensor, start: int, block: int, base: float
) -> Tensor:
    """Pool new keys (B, K, T, D) into the block that is not whole; what becomes whole is written to the features."""
    done, width = 0, k_raw.size(3)
    while done < k_raw.size(2):
        place = start + done
        part = k_raw[:, :, done : done + block - place % block].float()
        here = valid[:, None, place : place + part.size(2), None]
        total, largest, smallest, number = running.split([width, width, width, 1], -1)
        if place % block == 0:
            total, number = torch.zeros_like(total), torch.zeros_like(number)
        some = number > 0
        largest = torch.where(some, largest, -math.inf)
        smallest = torch.where(some, smallest, math.inf)
        total = total + (part * here).sum(2, keepdim=True)
        largest = torch.maximum(largest, part.masked_fill(~here, -math.inf).amax(2, keepdim=True))
        smallest = torch.minimum(smallest, part.masked_fill(~here, math.inf).amin(2, keepdim=True))
        number = number + here.sum(2, keepdim=True)
        running = torch.cat((total, largest, smallest, number.expand(*total.shape[:3], 1)), -1)
        done += part.size(2)
        if (start + done) % block == 0:
            extremes = (torch.where(number > 0, e, 0.0) for e in (largest, smallest))
            pools = torch.cat((total / number.clamp_min(1), *extremes), -1)
            first = torch.tensor([start + done - block], device=key.device)
            features[:, :, (start + done) // block - 1] = turned(pools @ key.float(), first, base)[:, :, 0]
    return running


def _grown(
    buffers: Sequence[Tensor], axes: Sequence[int], filled_: int, wanted: int, unit: int, in_place: bool
) -> list[Tensor]:
    """Buffers with room for what is wanted, in whole units; copies unless they may be written to."""
    found: list[Tensor] = []
    for x, axis in zip(buffers, axes, strict=True):
        if x.size(axis) >= wanted:
            found.append(x if in_place else x.clone())
            continue
        shape = list(x.shape)
        shape[axis] = -(-max(2 * x.size(axis), wanted) // unit) * unit
        made = x.new_zeros(shape)
        made.narrow(axis, 0, filled_).copy_(x.narrow(axis, 0, filled_))
        found.append(made)
    return found
