"""``gatecc::transient``: a GRU that runs while a switch is on, from a state of zero each time that it comes on.

The runs of a switch depend on nothing before them, so they are sequences of their own: packed side by side, they cost
what their steps cost, and steps that are off cost nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from gatecc.codegen.onnx.lowering import GRADIENT
from gatecc.ops.paths import Taken
from gatecc.ops.registry import Carry, Operator, StepRule, register
from gatecc.ops.transforms import instead


@torch.library.custom_op("gatecc::transient", mutates_args=())
def transient(
    x: Tensor,
    active: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x: (B, N, C), active: (B, N) of bool -> hidden states (B, N, H), 0 where the switch is off, and the last, (B, H).

    w_in: (3H, C), w_state: (3H, H) and biases (3H,) as in torch.nn.GRU. state: (B, H), the last state of what came
    before, which is 0 where the switch was off; None is zero.
    """
    out = _packed(_plan(active), x, w_in, w_state, b_in, b_state, state)
    return out, (out[:, -1] if out.size(1) else _start(x, w_state, state)).clone()


@transient.register_fake
def _(
    x: Tensor,
    active: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.size(0), x.size(1), w_state.size(1)), x.new_empty(x.size(0), w_state.size(1))


@torch.library.custom_op("gatecc::transient_backward", mutates_args=())
def transient_backward(
    grad: Tensor,
    grad_last: Tensor,
    x: Tensor,
    active: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, the four weights and the state; the forward pass is run again rather than kept."""
    plan = _plan(active)  # outside of vjp, for it is read on the host

    def forward(x: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor, state: Tensor) -> Any:
        out = _packed(plan, x, w_in, w_state, b_in, b_state, state, spelled=True)
        return out, out[:, -1] if out.size(1) else state

    given = (x, w_in, w_state, b_in, b_state, state)
    pull = torch.func.vjp(forward, *given)[1]
    gx, gw, gs, gb, gt, g0 = (g.contiguous().clone() for g in pull((grad, grad_last)))
    return gx, gw, gs, gb, gt, g0


@transient_backward.register_fake
def _(grad: Tensor, grad_last: Tensor, x: Tensor, active: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, *rest))


def _start(x: Tensor, w_state: Tensor, state: Tensor | None) -> Tensor:
    return x.new_zeros(x.size(0), w_state.size(1)) if state is None else state


class _Plan(NamedTuple):
    """How the runs of a switch lie side by side: ``order`` are the steps that are on, by their place in their run, the
    longest runs first; ``sizes`` how many runs have a first step, a second, ...; ``first`` where the runs begin."""

    order: Tensor
    sizes: Tensor
    first: Tensor


def _plan(active: Tensor) -> _Plan | None:
    """The plan of a switch; None if it is never on."""
    at = active.reshape(-1).nonzero().squeeze(1)  # the steps that are on, in order
    if not at.numel():
        return None
    before = torch.zeros_like(active)
    before[:, 1:] = active[:, :-1]
    starts = (active & ~before).reshape(-1).nonzero().squeeze(1)
    run = torch.searchsorted(starts, at, right=True) - 1  # of each step that is on
    order = run.bincount(minlength=starts.numel()).argsort(descending=True, stable=True)
    rank = torch.empty_like(order)
    rank[order] = torch.arange(order.numel(), device=order.device)
    offset = at - starts[run]
    packed = (offset * starts.numel() + rank[run]).argsort()
    return _Plan(at[packed], offset.bincount().cpu(), starts[order])


def _packed(
    plan: _Plan | None,
    x: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor | None,
    spelled: bool = False,
) -> Tensor:
    """Every run of the switch as a sequence of its own, in one call of torch.gru, or spelled out for torch.func."""
    (B, N), H = x.shape[:2], w_state.size(1)
    zeros = x.new_zeros(B * N, H)
    if plan is None:
        return zeros.view(B, N, H)
    h = x.new_zeros(plan.first.numel(), H)
    if state is not None:  # what was on before goes on where the first step is on
        begins = (plan.first % N == 0).unsqueeze(1)
        h = torch.where(begins, state.index_select(0, plan.first // N), h)
    data = x.reshape(B * N, x.size(2)).index_select(0, plan.order)
    weights = [w_in, w_state, b_in, b_state]
    if spelled:
        out = _cells(data, plan.sizes.tolist(), h, *weights)
    else:
        out, _ = torch.gru(data, plan.sizes, h.unsqueeze(0), weights, True, 1, 0.0, False, False)
    return zeros.index_copy(0, plan.order, out.to(zeros.dtype)).view(B, N, H)


def _cells(
    data: Tensor, sizes: Sequence[int], h: Tensor, w_in: Tensor, w_state: Tensor, b_in: Tensor, b_state: Tensor
) -> Tensor:
    """torch.gru on packed runs, step by step: torch.func cannot look into that, for it reads its sizes on the host."""
    out = list[Tensor]()
    for read in (data @ w_in.mT + b_in).split(list(sizes)):
        h = _cell(read, h[: read.size(0)], w_state, b_state)
        out.append(h)
    return torch.cat(out)


def _cell(read: Tensor, h: Tensor, w_state: Tensor, b_state: Tensor) -> Tensor:
    (r, z, n), (hr, hz, hn) = read.chunk(3, -1), (h @ w_state.mT + b_state).chunk(3, -1)
    r, z = torch.sigmoid(r + hr), torch.sigmoid(z + hz)
    n = torch.tanh(n + r * hn)
    return n + z * (h - n)


def masked(
    x: Tensor,
    active: Tensor,
    w_in: Tensor,
    w_state: Tensor,
    b_in: Tensor,
    b_state: Tensor,
    state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The same step by step in plain ATen: every step is computed, and masked. Has every derivative."""
    h, out = _start(x, w_state, state), list[Tensor]()
    for read, on in zip((x @ w_in.mT + b_in).unbind(1), active.to(x.dtype).unbind(1), strict=True):
        h = on.unsqueeze(-1) * _cell(read, h, w_state, b_state)
        out.append(h)
    return torch.stack(out, 1) if out else x.new_zeros(x.size(0), 0, w_state.size(1)), h


def _masked_backward(grad: Tensor, grad_last: Tensor, x: Tensor, active: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
    def forward(x: Tensor, *rest: Tensor) -> Any:
        return masked(x, active, *rest)

    return torch.func.vjp(forward, x, *rest)[1]((grad, grad_last))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
    x, active, *weights, state = ctx.saved_tensors
    start = _start(x, weights[1], state)
    gx, *found, of_state = transient_backward(grad.contiguous(), grad_last.contiguous(), x, active, *weights, start)
    return (gx, None, *found, None if state is None else of_state)


def _second(ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
    grad, grad_last, x, active, *rest = ctx.saved_tensors

    def backward(grad: Tensor, grad_last: Tensor, x: Tensor, *rest: Tensor) -> Any:
        return _masked_backward(grad, grad_last, x, active, *rest)

    g, gl, gx, *others = torch.func.vjp(backward, grad, grad_last, x, *rest)[1](cotangents)
    return (g, gl, gx, None, *others)


transient.register_autograd(_backward, setup_context=_setup)
transient_backward.register_autograd(_second, setup_context=_setup)
instead(transient, masked)
instead(transient_backward, _masked_backward)


def _known(active: Tensor) -> bool:
    return active.device.type != "meta" and not isinstance(active, FakeTensor)


def _flops(
    x: Sequence[int],
    active: Sequence[int],
    w_in: Sequence[int],
    w_state: Sequence[int],
    *_: Any,
    slots: int | None = None,
) -> int:
    """Two matrices meet each step that is on, two operations per multiply-add."""
    steps = active[0] * active[1] if slots is None else slots
    return 2 * steps * w_in[0] * (w_in[1] + w_state[1])


def _served(x: Tensor, active: Tensor, w_in: Tensor, *_: Any) -> tuple[tuple[Any, ...], int, int]:
    on = int(active.sum()) if _known(active) else active.numel()
    return (w_in,), on, active.numel()


def _taken(x: Tensor, active: Tensor, w_in: Tensor, *_: Any, out: Any) -> Taken | None:
    return Taken("step", (int(active.sum()),), active.numel(), (w_in,)) if _known(active) else None


register(
    Operator(
        overload=torch.ops.gatecc.transient.default,
        step=StepRule(operand="x", axis=1, carries=(Carry("state", output=1),)),
        flops=_flops,
        served=_served,
        taken=_taken,
        masked=masked,
    )
)
register(Operator(overload=torch.ops.gatecc.transient_backward.default, onnx={"portable": GRADIENT}))
