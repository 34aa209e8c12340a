"""Tasks that measure what a mixer can do: recall of pairs (MQAR), capacity of a linear state, bytes of real source."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from gatecc.errors import ArgumentError
from gatecc.train.losses import IGNORED

Mixer = Callable[[Tensor, Tensor, Tensor], Tensor]


def mqar(
    vocabulary: int, length: int, pairs: int, a: float = 0.01, seed: int = 0, *, batch: int = 1, fill: bool = True
) -> tuple[Tensor, Tensor]:
    """Multi-query associative recall (Zoology, 2023): ids and labels, both (batch, length).

    The context is ``pairs`` times key, value; each key stands there once. Later each key is asked once more, and what
    the model predicts there must be its value: ``labels`` hold it at the query and are -100 elsewhere (compare
    ``logits.argmax(-1)`` with ``labels``, without a shift). Keys are 1 .. V/2 - 1, values V/2 .. V - 1. The gap
    between the context and a query follows the power law p(i) ~ a i^(a-1): a small ``a`` asks soon. Other positions,
    the one after a query too, hold random tokens as in Zoology's code, or 0 if ``fill`` is False.

    Raises ArgumentError for an odd length or one below 4 pairs, or a vocabulary with fewer than ``pairs`` keys.
    """
    if length % 2 or 4 * pairs > length or pairs < 1:
        raise ArgumentError(
            "the pairs and their queries do not fit",
            found=f"length={length}, pairs={pairs}",
            expected="even, >= 4·pairs",
        )
    if vocabulary // 2 - 1 < pairs:
        raise ArgumentError("too few keys", found=f"vocabulary={vocabulary}", expected=f"at least {2 * pairs + 2}")
    g = torch.Generator().manual_seed(seed)
    half, context = vocabulary // 2, 2 * pairs
    keys = 1 + _distinct(batch, half - 1, pairs, g)
    values = half + _distinct(batch, vocabulary - half, pairs, g)
    ids = torch.randint(1, vocabulary, (batch, length), generator=g) if fill else torch.zeros(batch, length).long()
    ids[:, 0:context:2], ids[:, 1:context:2] = keys, values
    slots = (length - context) // 2
    odds = a * torch.arange(1, slots + 1, dtype=torch.float64) ** (a - 1)
    gaps = torch.multinomial(odds.expand(batch, -1), pairs, replacement=False, generator=g)
    labels = torch.full((batch, length), IGNORED)
    query = context + 2 * gaps
    ids.scatter_(1, query, keys)
    labels.scatter_(1, query, values)
    return ids, labels


def recall(logits: Tensor, labels: Tensor) -> float:
    """The fraction of queries answered rightly: logits (B, N, V), labels (B, N) of `mqar`."""
    asked = labels != IGNORED
    return float((logits.argmax(-1)[asked] == labels[asked]).double().mean())


def capacity(
    mixer: Mixer | None = None,
    dim: int = 64,
    pairs: tuple[int, ...] | None = None,
    *,
    orthonormal: bool = False,
    samples: int = 8,
    seed: int = 0,
) -> dict[int, float]:
    """Recall of a state against the number of pairs that one head stores (Pavlovian attention, 2025): pairs -> recall.

    Unit keys and values are written one after the other, then each key is asked. An answer counts if at least half of
    its energy is the value's: its cosine with it is above 1/√2, which does not depend on a mixer's scale. A linear
    state answers with energy 1 for the value and n/dim for the other pairs, so its recall has its knee at ``dim``
    pairs. Orthonormal keys are exact up to ``dim`` (more do not exist: ArgumentError).

    ``mixer(q, k, v)`` is causal, all (samples, 1, 2n, dim): n pairs with queries of 0, then n queries with keys and
    values of 0. None is plain linear attention. ``pairs``: the numbers to try.
    """
    g = torch.Generator().manual_seed(seed)
    fractions = (0.25, 0.5, 1.0) if orthonormal else (0.25, 0.5, 1.0, 2.0, 4.0)
    counts = pairs or tuple(max(1, round(dim * x)) for x in fractions)
    if orthonormal and max(counts) > dim:
        raise ArgumentError("there are not so many orthonormal keys", found=str(max(counts)), expected=f"at most {dim}")
    return {n: _recalled(mixer or _linear, n, dim, samples, orthonormal, g) for n in counts}


def _recalled(mixer: Mixer, n: int, dim: int, samples: int, orthonormal: bool, g: torch.Generator) -> float:
    keys = torch.randn(samples, 1, n, dim, generator=g)
    if orthonormal:
        keys = torch.linalg.qr(torch.randn(samples, 1, dim, dim, generator=g)).Q[:, :, :n]
    keys = F.normalize(keys, dim=-1)
    values = F.normalize(torch.randn(samples, 1, n, dim, generator=g), dim=-1)
    none = torch.zeros_like(keys)
    # The stored pairs have no query and the queries no key: a state is read, not a neighbour.
    out = mixer(torch.cat((none, keys), 2), torch.cat((keys, none), 2), torch.cat((values, none), 2))[:, :, n:]
    return float((F.cosine_similarity(out, values, dim=-1) > 0.5**0.5).double().mean())


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).tril() @ v


def stdlib_bytes(limit: int | None = None) -> tuple[Tensor, Tensor]:
    """The source of this Python's standard library as bytes: (train, held out), each (N,) of uint8.

    A file is held out if the SHA-256 of its path relative to the library is 0 mod 20. Tests, idlelib and site-packages
    are left out; files are joined in the order of their paths. ``limit`` cuts both after so many bytes.
    """
    root = Path(sysconfig.get_paths()["stdlib"])
    parts: tuple[list[bytes], list[bytes]] = ([], [])
    for file in sorted(root.rglob("*.py"), key=str):
        name = file.relative_to(root).as_posix()
        if "site-packages" in name or "idlelib" in name or "/test" in f"/{name}":
            continue
        held = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 20 == 0
        parts[held].append(file.read_bytes())
    train, held_out = (torch.frombuffer(bytearray(b"\n\n".join(p))[:limit], dtype=torch.uint8).clone() for p in parts)
    return train, held_out


@torch.no_grad()
def bits_per_token(
    logits: Callable[[Tensor], Tensor], stream: Tensor, length: int = 512, windows: int = 30, batch: int = 6
) -> float:
    """Mean cross entropy in bits over the first windows of a stream (N,): bits per byte if the tokens are bytes.

    ``logits`` maps ids (B, length) to (B, length, V). Raises ArgumentError if the stream is too short.
    """
    if stream.numel() < windows * length + 1:
        raise ArgumentError(
            "the stream is too short", found=f"{stream.numel()} tokens", expected=f"{windows * length + 1}"
        )
    total = 0.0
    for first in range(0, windows, batch):
        starts = range(first, min(windows, first + batch))
        x = torch.stack([stream[i * length : (i + 1) * length + 1] for i in starts]).long()
        out = logits(x[:, :-1]).float()
        total += float(F.cross_entropy(out.flatten(0, 1), x[:, 1:].flatten(), reduction="sum"))
    return total / (windows * length * math.log(2))


def windows_of(stream: Tensor, length: int, count: int, seed: int = 0) -> Tensor:
    """Random windows of a stream (N,) of tokens: (count, length) of int64."""
    g = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, stream.numel() - length + 1, (count, 1), generator=g)
    return stream[starts + torch.arange(length)].long()


def _distinct(batch: int, n: int, k: int, g: torch.Generator) -> Tensor:
    """k different numbers below n in random order, for each of the batch: (batch, k)."""
    return torch.rand(batch, n, generator=g).topk(k, -1).indices
