"""Threads along the sequence, where there are fewer heads than threads.

A state after a part of a sequence is (the product of its gates) · (the state before it) + (the state from zero), so
parts may run at once: first from zero, states only; then, with the states carried from part to part, in full. The
gradient of the state is carried in the same way from the end. With the delta rules a part multiplies by a matrix, not
by gates: they are not split.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from gatecc.ops.linear_attention.problem import Problem

PART = 256  # tokens that are worth a thread of their own

# Problem -> the final states, from zero, and the products of the gates, (S, H, Dk).
Summary = Callable[[Problem], tuple[Tensor, Tensor]]


def parts_of(p: Problem, threads: int) -> int:
    """Into how many parts each sequence is split; 1 for not at all."""
    jobs = len(p.segments) * p.q.size(1)
    if p.beta is not None or not 0 < 2 * jobs <= threads:
        return 1
    return max(1, min(threads // jobs, p.q.size(2) // PART))


def split(p: Problem, parts: int, summary: Summary) -> Problem:
    """The problem with its parts as sequences, in the order in which they run, from their true states."""
    fine = p._replace(segments=_cut(p, parts), state=None)
    return fine._replace(state=_carry(p.state, *summary(fine), parts))


def split_gradient(fine: Problem, grad_o: Tensor, grad_state: Tensor, parts: int, summary: Summary) -> Tensor:
    """Gradients of the states after each part, from that of the last, (S, H, Dk, E)."""
    # The gradient D of the state obeys D <- a_t (D + q_t do_t^T) from the end: a recurrence with keys a_t q_t.
    keys = fine.q.float() * fine.scale
    decay = fine.activated().log_decay
    if decay is not None:
        gates = decay.float().exp()
        keys = keys * gates.repeat_interleave(keys.size(1) // gates.size(1), 1)
    back = fine._replace(k=keys, v=grad_o, reverse=not fine.reverse, state=None, segments=_turned(fine.segments, parts))
    found = _carry(grad_state, *summary(back), parts)
    return found.unflatten(0, (-1, parts)).flip(1).flatten(0, 1)


def outermost(states: Tensor, parts: int, which: int) -> Tensor:
    """States of the first part (0) or the last (-1) of each sequence."""
    return states.unflatten(0, (-1, parts))[:, which].contiguous()


def _cut(p: Problem, parts: int) -> tuple[tuple[int, int, int], ...]:
    found: list[tuple[int, int, int]] = []
    for row, first, length in p.segments:
        edges = [first + length * i // parts for i in range(parts + 1)]
        pieces = [(row, start, end - start) for start, end in pairwise(edges)]
        found += reversed(pieces) if p.reverse else pieces
    return tuple(found)


def _turned(segments: tuple[tuple[int, int, int], ...], parts: int) -> tuple[tuple[int, int, int], ...]:
    """The parts of each sequence in the other order."""
    return tuple(segments[i - i % parts + parts - 1 - i % parts] for i in range(len(segments)))


def _carry(start: Tensor | None, local: Tensor, decay: Tensor, parts: int) -> Tensor:
    """States before each part, (S * parts, H, Dk, E), from those after it when it starts from zero."""
    local, decay = (x.unflatten(0, (-1, parts)) for x in (local, decay))
    state = torch.zeros_like(local[:, 0]) if start is None else start
    found: list[Tensor] = []
    for i in range(parts):
        found.append(state)
        state = decay[:, i].unsqueeze(-1) * state + local[:, i]
    return torch.stack(found, 1).flatten(0, 1)
