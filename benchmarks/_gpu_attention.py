"""Attention on a GPU: our operator against flash attention, FlexAttention and what compilers make of SDPA."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from _races import Place, Race, Work, call, mode, other, quietly
from torch import Tensor

from gatecc.ops.attention import attention as gated_attention
from gatecc.ops.attention.region import attention_region


def attention(place: Place) -> Iterator[Race]:
    """Attention with a gate on its heads: our operator, the same compiled by gatecc and by Inductor, FlexAttention, and
    flash attention without the gate; forward, with a backward pass, and a step of a decoder."""
    B, H, G, D = place.pick(4, 1), place.pick(16, 2), place.pick(4, 1), place.pick(128, 16)
    for N in (2048, 8192) if not place.small else (32,):
        tensors = place.randn(B, H, N, D), place.randn(B, G, N, D), place.randn(B, G, N, D), place.randn(B, H, N, D)
        causal = _flex(place, B, N, N, lambda b, h, i, j: i >= j)
        calls: dict[str, Any] = {
            "ours": lambda q, k, v, g: gated_attention(q, k, v, g, causal=True, gate_activation="sigmoid")[0],
            "ours, compiled from SDPA": torch.compile(_gated, backend="gatecc", mode=mode(place)),
            "Inductor": torch.compile(_gated, backend=other(place)),
            "FlexAttention": lambda q, k, v, g, f=causal: f(q, k, v) * g.sigmoid(),
            "eager": _gated,
            "flash SDPA": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
        }
        for backward in (False, True):
            what = f"gated attention, {'forward and backward' if backward else 'forward'}, "
            contenders = {name: call(f, name, tensors, backward=backward) for name, f in calls.items()}
            yield Race(f"{what}B={B} H={H} G={G} N={N} D={D}", contenders)
    yield from _other_attention(place, B, H, G, D)
    yield _printed(place, B, H, G, D)
    for S in (4096, 65536) if not place.small else (64,):
        q, k, v, g = place.randn(B, H, 1, D), place.randn(B, G, S, D), place.randn(B, G, S, D), place.randn(B, H, 1, D)
        every = _flex(place, B, 1, S, None)
        steps: dict[str, Work] = {
            "ours": lambda t=(q, k, v, g): gated_attention(*t, causal=True, gate_activation="sigmoid"),
            "FlexAttention": lambda t=(q, k, v), g=g, f=every: f(*t) * g.sigmoid(),
            "flash SDPA": lambda t=(q, k, v): F.scaled_dot_product_attention(*t, enable_gqa=True),
        }
        size = place.pick(128, 16)
        blocks = torch.rand(1, 1, 1, S // size, device=place.device) < 0.25
        blocks[..., -1] = True
        steps["ours, a quarter of the blocks"] = lambda t=(q, k, v, g), m=blocks, n=size: gated_attention(
            *t, causal=True, gate_activation="sigmoid", blocks=m, block_sizes=(1, n)
        )
        what = f"gated attention, one query of {S} keys, B={B} H={H} G={G} D={D}"
        yield Race(what, {name: quietly(step) for name, step in steps.items()})


def _other_attention(place: Place, B: int, H: int, G: int, D: int) -> Iterator[Race]:
    """What flash attention has no form for: a window, a cap, a map of blocks."""
    N, size = place.pick(8192, 64), place.pick(128, 16)
    q, k, v = place.randn(B, H, N, D), place.randn(B, G, N, D), place.randn(B, G, N, D)
    window = place.pick(1024, 20)
    blocks = torch.rand(1, 1, N // size, N // size, device=place.device) < 0.25
    blocks |= torch.eye(N // size, dtype=torch.bool, device=place.device)
    near = _flex(place, B, N, N, lambda b, h, i, j: (i >= j) & (i - j < window))
    capped = _flex(place, B, N, N, lambda b, h, i, j: i >= j, lambda s, b, h, i, j: 30.0 * torch.tanh(s / 30.0))
    chosen = _flex(place, B, N, N, lambda b, h, i, j: blocks[0, 0, i // size, j // size], block=size)
    pairs: dict[str, tuple[Work, Work]] = {
        f"window of {window}": (
            lambda: gated_attention(q, k, v, causal=True, window=window),
            lambda: near(q, k, v),
        ),
        "soft cap": (lambda: gated_attention(q, k, v, causal=True, softcap=30.0), lambda: capped(q, k, v)),
        "a quarter of the blocks": (
            lambda: gated_attention(q, k, v, blocks=blocks, block_sizes=(size, size)),
            lambda: chosen(q, k, v),
        ),
    }
    for what, (ours, flex) in pairs.items():
        contenders: dict[str, Work | str] = {"ours": quietly(ours), "FlexAttention": quietly(flex)}
        yield Race(f"attention, {what}, forward, B={B} H={H} G={G} N={N} D={D}", contenders)


def _printed(place: Place, B: int, H: int, G: int, D: int) -> Race:
    """A norm of each head and a gate behind it, in the kernel that is printed for them."""
    N = place.pick(4096, 40)
    q, k, v, g = place.randn(B, H, N, D), place.randn(B, G, N, D), place.randn(B, G, N, D), place.randn(B, H, N, D)
    scale = place.randn(D)

    def following(heads: Tensor, gate: Tensor, scale: Tensor) -> Tensor:
        return F.rms_norm(heads, (heads.size(-1),), scale, 1e-5) * F.silu(gate)

    def whole() -> Tensor:
        return following(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True), g, scale)

    operator: Any = attention_region(following, q, (g, scale), ["a race"], causal=True).operator
    contenders: dict[str, Work | str] = {
        "ours": quietly(lambda: operator(q, k, v, None, None, g, scale)),
        "Inductor": quietly(torch.compile(whole, backend=other(place))),
        "eager": quietly(whole),
    }
    return Race(f"attention, a norm of each head and a gate, forward, B={B} H={H} G={G} N={N} D={D}", contenders)


def _gated(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True) * g.sigmoid()


def _flex(place: Place, B: int, N: int, S: int, seen: Any, score: Any = None, block: int = 128) -> Any:
    """FlexAttention with a mask, as its authors compile it."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    mask = None if seen is None else create_block_mask(seen, None, None, N, S, device=place.device, BLOCK_SIZE=block)
    compiled = torch.compile(flex_attention, backend=other(place))
    return lambda q, k, v: compiled(q, k, v, score_mod=score, block_mask=mask, enable_gqa=True)
