"""``gatecc::moe_ffn`` in ATen: rows sorted by expert, matrix products of an expert at a time.

What every device falls back to, in every dtype; float64 is for checking. How many rows an expert has is read on the
host, so a GPU waits here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.schedule import Schedule, schedule


class Gradients(NamedTuple):
    """Of the operator's tensors but the indices; None where none was asked for."""

    x: Tensor | None
    weights: Tensor | None
    gate_up: Tensor | None
    down: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


def forward(a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The result, and with ``keep`` the first products (T k, rows) in the schedule's order, zero for empty slots."""
    plan = schedule(a.indices, a.experts)
    R = plan.order.numel()
    hidden = a.x.new_empty(a.hidden_shape) if keep else None
    if hidden is not None:
        hidden[R:].zero_()
    given = a.x.index_select(0, plan.order // max(a.slots, 1))
    results = a.x.new_empty(R, a.down.size(1))
    for e, first, rows in plan.segments():
        h = _linear(given.narrow(0, first, rows), a.gate_up[e], None if a.gate_up_bias is None else a.gate_up_bias[e])
        if hidden is not None:
            hidden.narrow(0, first, rows).copy_(h)
        y = _linear(a.activation.hidden(h, a.layout), a.down[e], None if a.down_bias is None else a.down_bias[e])
        results.narrow(0, first, rows).copy_(y)
    return combined(a, plan, results), hidden


def combined(a: Arguments, plan: Schedule, results: Tensor) -> Tensor:
    """Results (R, o) weighted and summed by slot, in the order of slots: the same sum at every run."""
    weighted = a.weights.reshape(-1, 1).index_select(0, plan.order).to(a.wide) * results.to(a.wide)
    slots = weighted.new_zeros(a.tokens * a.slots, a.down.size(1))
    slots = slots.index_copy_(0, plan.order, weighted).view(a.tokens, a.slots, a.down.size(1))
    if a.combine == "slots":
        return slots.to(a.x.dtype)
    return in_order(slots).to(a.x.dtype)


def in_order(slots: Tensor) -> Tensor:
    """(T, k, o) -> (T, o), summed from the first slot to the last."""
    total = slots.new_zeros(slots.size(0), slots.size(2))
    for slot in slots.unbind(1):
        total = total + slot
    return total


def backward(a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients:
    """Gradients of x, weights, gate_up, down and the biases, those that are needed.

    grad: as the result; hidden: what ``forward`` has kept. With u = grad W2 of a slot's row, <u, a> + <grad, b2> is
    the gradient of the slot's weight, so that the second products need not be kept.
    """
    plan, k, F = schedule(a.indices, a.experts), max(a.slots, 1), a.down.size(2)
    R, tokens = plan.order.numel(), plan.order // k
    weight = a.weights.reshape(-1, 1).index_select(0, plan.order).to(a.wide)
    g = grad.index_select(0, tokens) if a.combine == "sum" else grad.flatten(0, 1).index_select(0, plan.order)
    act = a.activation.hidden(hidden[:R], a.layout)
    dx = a.x.new_empty(R, a.x.size(1))
    dgate_up, ddown = (torch.zeros_like(w) if need else None for w, need in ((a.gate_up, needs[2]), (a.down, needs[3])))
    u = a.x.new_empty(R, F)
    for e, first, rows in plan.segments():
        torch.mm(g.narrow(0, first, rows), a.down[e], out=u.narrow(0, first, rows))
    dw = (u.to(a.wide) * act.to(a.wide)).sum(1)
    if a.down_bias is not None:
        experts = torch.repeat_interleave(torch.tensor(plan.counts, device=g.device))
        dw = dw + (g.to(a.wide) * a.down_bias.index_select(0, experts).to(a.wide)).sum(1)
    dh = a.activation.gradient((u.to(a.wide) * weight).to(a.x.dtype), hidden[:R], a.layout)
    weighted = (act.to(a.wide) * weight).to(a.x.dtype)
    given = a.x.index_select(0, tokens) if needs[2] else None
    for e, first, rows in plan.segments():
        at = slice(first, first + rows)
        if needs[0]:
            torch.mm(dh[at], a.gate_up[e], out=dx[at])
        if dgate_up is not None and given is not None:
            torch.mm(dh[at].T, given[at], out=dgate_up[e])
        if ddown is not None:
            torch.mm(g[at].T, weighted[at], out=ddown[e])
    of_slots = dw.new_zeros(a.indices.numel()).index_copy_(0, plan.order, dw).view(a.indices.shape)
    return Gradients(
        _to_tokens(a, plan, dx) if needs[0] else None,
        of_slots.to(a.weights.dtype) if needs[1] else None,
        dgate_up,
        ddown,
        _by_expert(a.gate_up_bias, plan, dh) if needs[4] else None,
        _by_expert(a.down_bias, plan, g.to(a.wide) * weight) if needs[5] else None,
    )


def _to_tokens(a: Arguments, plan: Schedule, rows: Tensor) -> Tensor:
    """The sum of the rows (R, d) of each token, in the order of its slots."""
    slots = rows.new_zeros(a.tokens * a.slots, rows.size(1), dtype=a.wide)
    slots = slots.index_copy_(0, plan.order, rows.to(a.wide)).view(a.tokens, a.slots, rows.size(1))
    return in_order(slots).to(a.x.dtype)


def _by_expert(bias: Tensor | None, plan: Schedule, rows: Tensor) -> Tensor | None:
    """The sum of the rows (R, n) of each expert."""
    if bias is None:
        return None
    found = torch.zeros_like(bias)
    for e, first, count in plan.segments():
        found[e] = rows.narrow(0, first, count).sum(0, dtype=torch.promote_types(rows.dtype, torch.float32))
    return found


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.mm(x, weight.T) if bias is None else torch.addmm(bias, x, weight.T)
