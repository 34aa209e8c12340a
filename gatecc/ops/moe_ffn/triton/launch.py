"""Calls of experts handed to the kernels: which run, in what order, on which buffers."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from gatecc.codegen.triton.sizes import block_of, cdiv
from gatecc.ops.moe_ffn.arguments import Arguments
from gatecc.ops.moe_ffn.segments import Gradients
from gatecc.ops.moe_ffn.triton.kernels.gradients import outer
from gatecc.ops.moe_ffn.triton.kernels.projections import activate, add_slots, project
from gatecc.ops.moe_ffn.triton.plan import plan
from gatecc.ops.moe_ffn.triton.tables import Blocks, Kernel, blocks, load, matrices, rows

By = Literal["place", "slot", "token"]  # of the order, of all slots, of all tokens: what an operand has its rows by


def forward(a: Arguments, *, keep: bool) -> tuple[Tensor, Tensor | None]:
    """The result, and with ``keep`` the first products, by place of the order, zero for empty slots."""
    run = _Run(a)
    if keep:
        hidden = run.room(a.gate_up.size(1), a.x.dtype)
        run.project(a.x, a.gate_up, a.gate_up_bias, hidden, read="token", write="place")
        return run.combined(a.activation.hidden(hidden, a.layout)), hidden
    return run.combined(run.activated()), None


def backward(a: Arguments, grad: Tensor, hidden: Tensor, needs: list[bool]) -> Gradients:
    """As segments.backward: first of the rows that the second products read, then of each tensor on its own."""
    run, F = _Run(a), a.down.size(2)
    g, by = (grad, "token") if a.combine == "sum" else (grad.flatten(0, 1), "slot")
    u = run.room(F, a.x.dtype)
    run.project(g, a.down.mT, None, u, read=by, write="place")
    act, pull = _activated(a, hidden)
    there = run.plan.experts < a.experts
    weight = torch.where(there, run.weights.to(torch.float32)[run.plan.order], 0.0)
    (dh,) = pull((u.float() * weight[:, None]).to(u.dtype))
    dx = dgate_up = ddown = dgate_up_bias = ddown_bias = None
    if needs[0]:
        dx = run.room(a.x.size(1))
        run.project(dh, a.gate_up.mT, None, dx, read="place", write="slot")
        dx = run.summed(dx)
    if needs[2] or needs[4]:
        dgate_up, dgate_up_bias = run.outer(dh, a.x, a.gate_up, a.gate_up_bias, left="place", right="token")
    if needs[3] or needs[5]:
        ddown, ddown_bias = run.outer(g, act, a.down, a.down_bias, left=by, right="place", weighted=True)
    return Gradients(
        dx,
        run.of_weights(u, act, g, by, there) if needs[1] else None,
        dgate_up if needs[2] else None,
        ddown if needs[3] else None,
        dgate_up_bias if needs[4] else None,
        ddown_bias if needs[5] else None,
    )


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three parts, as exact as float32; 16-bit inputs are multiplied as they are."""
    return "ieee" if torch.version.hip or dtype != torch.float32 else "tf32x3"


class _Run:
    """One call. A method launches the kernel of its name."""

    def __init__(self, a: Arguments) -> None:
        self.a, self.k = a, a.slots
        self.S = a.tokens * a.slots
        self.load = load(self.S, a.experts)
        self.weights = a.weights.reshape(-1)
        self.plan = plan(a.indices, a.experts, self.blocks("project").rows)

    def project(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        y: Tensor,
        *,
        read: By,
        write: By,
        weights: Tensor | None = None,
    ) -> None:
        """Fill y. w: (E, N, K)."""
        E, N, K = w.shape
        block = self.blocks("project", N, K)
        grid = (self.plan.number, cdiv(N, block.columns))
        given = (rows(x), matrices(w), rows(bias), weights, rows(y), self.plan.order, self.plan.table, self.k)
        self.start(project, block, grid, *given, E=E, N=N, K=K, READ=read, WRITE=write)

    def activated(self) -> Tensor:
        """What the second products read, by place of the order; nothing at the places of empty slots. (S, F)"""
        a = self.a
        (w, w_up), (bias, bias_up) = self.halves(a.gate_up), self.halves(a.gate_up_bias)
        assert w is not None
        E, N, K = w.shape
        y = self.room(N, a.x.dtype)
        block = self.blocks("activate", N, K)
        grid = (self.plan.number, cdiv(N, block.columns))
        given = (rows(a.x), matrices(w), matrices(w_up), rows(bias), rows(bias_up), rows(y))
        rest = (self.plan.order, self.plan.table, self.k)
        A, B = _options(a)
        self.start(activate, block, grid, *given, *rest, E=E, N=N, K=K, NAME=a.activation.name, A=A, B=B)
        return y

    def halves(self, w: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """Gate and up of stacked weights or biases, (E, 2F, ...); without a gate all of it."""
        if w is None or self.a.layout == "plain":
            return w, None
        half = w.size(1) // 2
        return (w[:, :half], w[:, half:]) if self.a.layout == "halves" else (w[:, 0::2], w[:, 1::2])

    def combined(self, act: Tensor) -> Tensor:
        """Second products, weighted, and summed by token unless slots are asked for."""
        a, slots = self.a, self.a.combine == "slots"
        y = self.room(a.down.size(1), a.x.dtype if slots else torch.float32)
        self.project(act, a.down, a.down_bias, y, read="place", write="slot", weights=self.weights)
        return y.view(a.output_shape) if slots else self.summed(y)

    def summed(self, x: Tensor) -> Tensor:
        """(S, N) -> (T, N), in the dtype of the call."""
        N = x.size(1)
        y = x.new_empty(self.a.tokens, N, dtype=self.a.x.dtype)
        block = self.blocks("add_slots")
        grid = (cdiv(self.a.tokens, block.rows), cdiv(N, block.columns))
        self.start(add_slots, block, grid, rows(x), rows(y), self.a.tokens, self.k, N=N)
        return y

    def outer(
        self,
        x: Tensor,
        y: Tensor,
        w: Tensor,
        bias: Tensor | None,
        *,
        left: By,
        right: By,
        weighted: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of stacked weights (E, N, K) and of their biases."""
        E, N, K = w.shape
        out, sums = w.new_empty(w.shape), None if bias is None else bias.new_empty(bias.shape)
        block = self.blocks("outer", N, K)
        grid = (cdiv(K, block.inner), cdiv(N, block.columns), E)
        weights = self.weights if weighted else None
        given = (rows(x), rows(y), weights, matrices(out), rows(sums), self.plan.order, self.plan.edges, self.k)
        self.start(outer, block, grid, *given, N=N, K=K, READ_A=left, READ_B=right)
        return out, sums

    def of_weights(self, u: Tensor, act: Tensor, g: Tensor, by: By, there: Tensor) -> Tensor:
        """The gradient of the slots' weights: what a slot would add, times the gradient of the result."""
        a, order = self.a, self.plan.order
        found = (u.float() * act.float()).sum(1)
        if a.down_bias is not None:
            of_rows = g[order // self.k if by == "token" else order].float()
            found = found + (of_rows * a.down_bias[self.plan.experts.clamp_max(a.experts - 1)].float()).sum(1)
        found = torch.where(there, found, 0.0)
        return torch.empty_like(found).index_copy_(0, order, found).view(a.weights.shape).to(a.weights.dtype)

    def start(self, kernel: Any, block: Blocks, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        """Launch a kernel."""
        sizes = {"BM": block.rows, "BN": block.columns, "BK": block.inner, "PRECISION": precision(self.a.x.dtype)}
        sizes = {name: x for name, x in sizes.items() if name in kernel.arg_names}
        with torch.cuda.device_of(self.a.x):
            kernel[grid](*given, **constants, **sizes, num_warps=block.warps, num_stages=block.stages)

    def blocks(self, kernel: Kernel, N: int = 1 << 30, K: int = 1 << 30) -> Blocks:
        """The blocks of a kernel for results of N columns and sums over K, of as many rows as the plan has."""
        most = blocks(kernel, self.a.x.dtype, self.load)
        return most._replace(columns=block_of(N, most.columns), inner=block_of(K, most.inner))

    def room(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(S, width), not filled."""
        return self.a.x.new_empty(self.S, width, dtype=dtype)


def _activated(a: Arguments, hidden: Tensor) -> Any:
    """What the second products read, and the function from its gradient to that of ``hidden``."""
    return torch.func.vjp(lambda h: a.activation.hidden(h, a.layout), hidden)


def _options(a: Arguments) -> tuple[float | None, float | None]:
    """The options of the activation, as its kernel takes them."""
    given = a.activation.options
    if a.activation.name == "swiglu":
        limit = given["limit"]
        return given["alpha"], None if limit == float("inf") else limit
    return next(iter(given.values()), None), None
