"""StateSpace: the common form of softmax attention, linear attention, delta rules and state-space layers.

    h_t = A_t h_(t-1) + B_t u_t,    y_t = C_t h_t + D_t u_t

(the Dynamical Systems Framework, Sieber et al. 2024). What a layer is follows from what these four are; two layers are
the same if their kernels are. Everything here is float64 and written for checks, not for speed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from gatecc.errors import ArgumentError


@dataclass(frozen=True)
class StateSpace:
    """A recurrence for each sample and head, with states h: (S, V).

    a: (B, H, N, S) for a diagonal A_t, or (B, H, N, S, S); b and c: (B, H, N, S); d: (B, H, N), None for 0;
    u: (B, H, N, V); start: (B, H, S, V), the state before the first token, None for 0.
    """

    a: Tensor
    b: Tensor
    c: Tensor
    u: Tensor
    d: Tensor | None = None
    start: Tensor | None = None

    @property
    def state(self) -> int:
        """S, the number of rows of a state."""
        return self.b.size(-1)

    @property
    def transition(self) -> Literal["identity", "scalar", "diagonal", "full"]:
        """What A_t is: 1 (nothing is forgotten), a number per token, a number per row of the state, or a matrix."""
        if self.a.dim() == 5:
            return "full"
        if bool((self.a == 1).all()):
            return "identity"
        return "scalar" if bool((self.a == self.a[..., :1]).all()) else "diagonal"

    def run(self) -> tuple[Tensor, Tensor]:
        """y: (B, H, N, V) and the last state, token by token."""
        h = self._first()
        out = [self.u.new_zeros(*self.u.shape[:2], 0, self.u.size(-1))]
        for t in range(self.u.size(2)):
            a = self.a[:, :, t]
            h = (a @ h if a.dim() == 4 else a.unsqueeze(-1) * h) + self.b[:, :, t, :, None] * self.u[:, :, t, None]
            out.append(self.c[:, :, t, None] @ h)
        y = torch.cat(out, 2)
        return (y if self.d is None else y + self.d.unsqueeze(-1) * self.u), h

    def _first(self) -> Tensor:
        empty = self.u.new_zeros(*self.b.shape[:2], self.state, self.u.size(-1))
        return empty if self.start is None else self.start

    def kernel(self) -> Tensor:
        """(B, H, N, N): y = K u where the start is 0, K_ts = C_t A_t .. A_(s+1) B_s, and D_t on the diagonal."""
        tokens = self.u.size(2)
        unit = torch.eye(tokens, dtype=self.u.dtype, device=self.u.device).expand(*self.u.shape[:2], -1, -1)
        return replace(self, u=unit, start=None).run()[0]

    def scaled(self, factor: float) -> StateSpace:
        """With ``factor`` y in the place of y."""
        return replace(self, c=self.c * factor, d=None if self.d is None else self.d * factor)

    def __add__(self, other: StateSpace) -> StateSpace:
        """Both side by side on one input, their outputs added: the states are stacked."""
        if not torch.equal(self.u, other.u):
            raise ArgumentError(
                "only state spaces of one input add up",
                found="two inputs",
                expected="the same u",
                do="make both of the same values",
            )
        full = self.a.dim() == 5 or other.a.dim() == 5
        a = _blocks(_matrix(self.a), _matrix(other.a)) if full else torch.cat([self.a, other.a], -1)
        d = [r.d for r in (self, other) if r.d is not None]
        return StateSpace(
            a,
            torch.cat([self.b, other.b], -1),
            torch.cat([self.c, other.c], -1),
            self.u,
            sum(d[1:], d[0]) if d else None,
            None if self.start is None and other.start is None else torch.cat([self._first(), other._first()], -2),
        )


def gap(one: StateSpace, other: StateSpace) -> float:
    """The largest difference of two kernels, relative to max(1, the largest entry): 0 if both are the same layer."""
    left, right = one.kernel(), other.kernel()
    if left.shape != right.shape:
        raise ArgumentError(
            "kernels of other shapes",
            found=f"{tuple(left.shape)} and {tuple(right.shape)}",
            expected="the same shape",
            do="compare layers with as many heads, on as many tokens",
        )
    return float((left - right).abs().max() / left.abs().max().clamp_min(1))


def linear(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor | None = None,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    *,
    scale: float | None = None,
    normalize: bool = False,
    mask: Tensor | None = None,
) -> StateSpace:
    """The form of ``gatecc::linear_attention``, with its arguments: linear, gated, delta and gated delta rules.

    A_t = diag(e^g_t), for the delta rules (I - beta_t k_t k_t^T) diag(e^g_t); B_t = k_t, or beta_t k_t; C_t = scale
    q_t. ``normalize`` divides C_t by q_t · z_t: normalisation is a matter of C. At padding A = 1 and B = C = 0.
    """
    heads = q.size(1)
    q, k, v = (_wide(x, heads) for x in (q, k, v))
    a = torch.ones_like(k) if log_decay is None else _wide(log_decay, heads).exp().expand_as(k)
    b, c = k, q * (k.size(-1) ** -0.5 if scale is None else scale)
    strength = None if beta is None else _wide(beta if beta.dim() == 4 else beta.unsqueeze(-1), heads)
    if mask is not None:
        keep = mask[:, None, :, None]
        a, b, c = torch.where(keep, a, 1.0), torch.where(keep, b, 0.0), torch.where(keep, c, 0.0)
    if strength is not None:
        erase = torch.eye(k.size(-1), dtype=k.dtype, device=k.device) - (strength * b).unsqueeze(-1) * b.unsqueeze(-2)
        a, b = erase * a.unsqueeze(-2), strength * b
    start = None if initial_state is None else initial_state.double()
    if not normalize:
        return StateSpace(a, b, c, v, start=start)
    if start is not None or strength is not None:
        other = "beta" if strength is not None else "initial_state"
        raise ArgumentError(
            "a normaliser has no such form", found=f"normalize=True and {other}", do="leave out one of them"
        )
    total = StateSpace(a, b, c, torch.ones_like(v[..., :1])).run()[0]
    return StateSpace(a, b, torch.where(total == 0, 0.0, c / torch.where(total == 0, 1.0, total)), v)


def of_weights(weights: Tensor, v: Tensor) -> StateSpace:
    """Any causal mixer y = W v: the state is the cache of values, A = 1, B_t the t-th unit vector, C_t row t of W.

    weights: (B, H, N, N), v: (B, Hv, N, V). Raises ArgumentError if a token reads a later one.
    """
    weights, v = weights.double(), _wide(v, weights.size(1))
    if weights.size(-1) != weights.size(-2) or bool(weights.triu(1).any()):
        raise ArgumentError(
            "a state space does not look ahead",
            found="weights on later tokens",
            expected="square weights, zero above the diagonal",
            do="choose causal sites",
        )
    unit = torch.eye(v.size(2), dtype=v.dtype, device=v.device).expand_as(weights)
    return StateSpace(torch.ones_like(weights), unit, weights, v)


def softmax(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, window: int | None = None) -> StateSpace:
    """Causal softmax attention. Its kernel e^(q·k) has a state without end; over N tokens the cache of values is one.

    C_t = softmax(scale q_t · k_s) over s <= t, the last ``window`` of them: the normalisation is a matter of C.
    """
    q, k = q.double(), _wide(k, q.size(1))
    at = torch.arange(q.size(2), device=q.device)
    distance = at[:, None] - at
    hidden = (distance < 0) | (distance >= (window or q.size(2)))
    scores = q @ k.mT * (q.size(-1) ** -0.5 if scale is None else scale)
    return of_weights(scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


def selective(x: Tensor, delta: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None = None) -> StateSpace:
    """S6, the selective state space of Mamba (Gu and Dao 2023): each channel is a head with values of width 1.

    x and delta: (B, N, C), a: (C, S) negative, b and c: (B, N, S), d: (C,).
    A_t = exp(delta_t a), B_t = delta_t b_t, C_t = c_t, D = d. It is gated linear attention with k = delta b, q = c,
    log decay = delta a and v = x.
    """
    x, delta, a, b, c = (t.double() for t in (x, delta, a, b, c))
    step = delta.mT.unsqueeze(-1)  # (B, C, N, 1)
    skip = None if d is None else d.double()[None, :, None].expand(x.size(0), -1, x.size(1))
    decay, channels = (step * a[:, None]).exp(), x.size(-1)
    write, read = step * b.unsqueeze(1), c.unsqueeze(1).expand(-1, channels, -1, -1)
    return StateSpace(decay, write, read, x.mT.unsqueeze(-1), skip)


def _wide(x: Tensor, heads: int) -> Tensor:
    """In float64, with the heads of queries."""
    return x.double() if x.size(1) == heads else x.double().repeat_interleave(heads // x.size(1), 1)


def _matrix(a: Tensor) -> Tensor:
    return a if a.dim() == 5 else torch.diag_embed(a)


def _blocks(one: Tensor, other: Tensor) -> Tensor:
    """The block-diagonal matrix of two."""
    size = one.size(-1) + other.size(-1)
    both = one.new_zeros(*one.shape[:3], size, size)
    both[..., : one.size(-1), : one.size(-1)] = one
    both[..., one.size(-1) :, one.size(-1) :] = other
    return both
