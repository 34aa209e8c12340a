"""One recurrence to compute, free of everything that is not the recurrence: what kernels are given.

Padding, the normaliser and broadcasting are taken off the arguments here (``prepare``, ``finish``) and put back on
gradients (``finish_backward``, ``prepare_backward``), so that no kernel knows of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from gatecc.ops.linear_attention.arguments import Arguments, boundaries
from gatecc.ops.linear_attention.gates import log_decay

# (q, k, v, log_decay, beta, state), all with H heads -> (o, final state): a recurrence in ATen.
Body = Callable[[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor], tuple[Tensor, Tensor]]
# Gradients of (q, k, v, log_decay, beta, state); None where the tensor is.
Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor]


class Problem(NamedTuple):
    """q: (B, H, N, Dk), k: (B, Hk, N, Dk), v: (B, Hv, N, E), log_decay: (B, Hg, N, Dk or 1), beta: (B, Hb, N, 1).

    Any strides, zero included; Hk, Hv, Hg and Hb divide H: head h reads head h // (H / Hk) of k. state: (S, H, Dk, E)
    in float32 (float64), contiguous, never written to; None is zero. ``segments`` are the sequences as (row of the
    batch, first token, length); q is to be multiplied by ``scale``; with ``reverse`` sequences run from their ends.
    With a ``normalizer`` log_decay holds logits: the log decay is logsigmoid(x) / normalizer.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    log_decay: Tensor | None
    beta: Tensor | None
    state: Tensor | None
    scale: float
    reverse: bool
    segments: tuple[tuple[int, int, int], ...]
    normalizer: float | None = None

    @property
    def packed(self) -> bool:
        """Whether a sequence is anything but a row of the batch."""
        N = self.q.size(2)
        return self.segments != tuple((row, 0, N) for row in range(self.q.size(0)))

    @property
    def state_dtype(self) -> torch.dtype:
        """float32, or float64."""
        return torch.promote_types(self.q.dtype, torch.float32)

    def new_state(self) -> Tensor:
        """Room for the states, not filled."""
        shape = (len(self.segments), self.q.size(1), self.q.size(3), self.v.size(3))
        return self.q.new_empty(shape, dtype=self.state_dtype)

    def with_state(self) -> Problem:
        """The same with zero written out."""
        return self if self.state is not None else self._replace(state=self.new_state().zero_())

    def activated(self) -> Problem:
        """The same with log decays, whether or not it came with logits."""
        if self.normalizer is None or self.log_decay is None:
            return self
        logits = self.log_decay.to(self.state_dtype)
        return self._replace(log_decay=log_decay(logits, self.normalizer), normalizer=None)

    def run(self, body: Body) -> tuple[Tensor, Tensor]:
        """o: (B, H, N, E) in the dtype of the state, and the final state, by an ATen form. Differentiable."""
        if self.normalizer is not None:
            return self.activated().run(body)
        start = self.with_state().state
        assert start is not None
        dtype, heads = start.dtype, self.q.size(1)
        q = self.q.to(dtype) * self.scale
        k, v = (_repeat(x.to(dtype), heads) for x in (self.k, self.v))
        decay, beta = (None if x is None else _repeat(x.to(dtype), heads) for x in (self.log_decay, self.beta))
        run = _directed(body, self.reverse)
        if not self.packed:
            return run(q, k, v, decay, beta, start)
        outputs: list[Tensor] = []
        states: list[Tensor] = []
        for index, (_, first, length) in enumerate(self.segments):
            cut = slice(first, first + length)
            g, b = (None if x is None else x[:, :, cut] for x in (decay, beta))
            o, state = run(q[:, :, cut], k[:, :, cut], v[:, :, cut], g, b, start[index : index + 1])
            outputs.append(o)
            states.append(state)
        return torch.cat(outputs, 2), torch.cat(states, 0)

    def differentiate(self, body: Body, grad_o: Tensor, grad_state: Tensor) -> Gradients:
        """Gradients by autograd through an ATen form."""
        given = {name: x for name, x in self.with_state()._asdict().items() if isinstance(x, Tensor)}

        def forward(*leaves: Tensor) -> tuple[Tensor, Tensor]:
            return self._replace(**dict(zip(given, leaves, strict=True))).run(body)

        # Inside an operator autograd is off; torch.func brings its own.
        pull = torch.func.vjp(forward, *given.values())[1]
        found = dict(zip(given, pull((grad_o.to(self.state_dtype), grad_state)), strict=True))
        q, k, v, state = (found[name] for name in ("q", "k", "v", "state"))
        return q, k, v, found.get("log_decay"), found.get("beta"), state


def prepare(a: Arguments) -> Problem:
    """The recurrence that the arguments ask for."""
    B, _, N, _ = a.q.shape
    v = a.v if a.mask is None else a.v.masked_fill(_padding(a.mask), 0)
    if a.normalize:
        v = torch.cat([v, v.new_ones(*v.shape[:-1], 1)], -1)
    # The key of a padding token is zero: nothing is written there. v and beta are zero because 0 times NaN is NaN.
    k = a.k if a.mask is None else a.k.masked_fill(_padding(a.mask), 0)
    decay = a.log_decay
    if decay is not None and decay.shape[::2] != (B, N):
        decay = decay.expand(B, -1, N, -1)
    if decay is not None and a.mask is not None:
        # A padding token keeps everything: a log decay of 0, a logit of infinity.
        decay = decay.masked_fill(_padding(a.mask), 0 if a.gate_normalizer is None else torch.inf)
    segments = (
        tuple((row, 0, N) for row in range(B))
        if a.cu_seqlens is None
        else tuple((0, first, last - first) for first, last in boundaries(a.cu_seqlens, N))
    )
    state = None if a.initial_state is None else a.initial_state.to(a.state_dtype).contiguous()
    beta = a.beta if a.beta is None or a.mask is None else a.beta.masked_fill(_padding(a.mask), 0)
    return Problem(a.q, k, v, decay, beta, state, a.scale, a.reverse, segments, a.gate_normalizer)


def finish(a: Arguments, o: Tensor) -> Tensor:
    """The output from the recurrence's: divided by the normaliser, zero at padding, in the dtype of q."""
    if a.normalize:
        o, z = o[..., :-1], o[..., -1:]
        # Not divided by zero even where that is thrown away: its gradient would be NaN.
        o = torch.where(z == 0, 0, o / torch.where(z == 0, 1, z))
    if a.mask is not None:
        o = o.masked_fill(_padding(a.mask), 0)
    return o.to(a.q.dtype)


def finish_backward(a: Arguments, o: Tensor | None, grad: Tensor) -> Tensor:
    """The gradient of the recurrence's output, from that of the operator's. ``o``: given with the normaliser only."""
    if a.mask is not None:
        grad = grad.masked_fill(_padding(a.mask), 0)
    if o is None:
        return grad
    o, z = o[..., :-1], o[..., -1:]
    inverse = torch.where(z == 0, 0, 1 / z)
    grad = grad.to(o.dtype) * inverse
    return torch.cat([grad, -(grad * o).sum(-1, keepdim=True) * inverse], -1)


def prepare_backward(a: Arguments, grads: Gradients) -> tuple[Tensor | None, ...]:
    """Gradients of (q, k, v, log_decay, beta, initial_state) in their shapes and dtypes, from the recurrence's."""
    q, k, v, decay, beta, state = grads
    v = v[..., :-1] if a.normalize else v
    if a.mask is not None:
        k, v = (x.masked_fill(_padding(a.mask), 0) for x in (k, v))
        decay, beta = (None if x is None else x.masked_fill(_padding(a.mask), 0) for x in (decay, beta))
    if a.log_decay is not None and decay is not None:
        decay = decay.sum_to_size(a.log_decay.shape)
    given = (a.q, a.k, a.v, a.log_decay, a.beta, a.initial_state)
    found = (q, k, v, decay, beta, state)
    return tuple(None if x is None or g is None else g.to(x.dtype) for x, g in zip(given, found, strict=True))


def _padding(mask: Tensor) -> Tensor:
    return ~mask[:, None, :, None]


def _repeat(x: Tensor, heads: int) -> Tensor:
    return x if x.size(1) == heads else x.repeat_interleave(heads // x.size(1), 1)


def _directed(body: Body, reverse: bool) -> Body:
    """A form that runs from the end: the tokens are turned around before and after."""
    if not reverse:
        return body

    def turned(
        q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor | None, beta: Tensor | None, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        g, b = (None if x is None else x.flip(2) for x in (log_decay, beta))
        o, state = body(q.flip(2), k.flip(2), v.flip(2), g, b, state)
        return o.flip(2), state

    return turned
