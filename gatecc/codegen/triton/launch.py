"""Problems of linear attention handed to the kernels: which run, in what order, on which buffers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.corrections import solve, strengths
from gatecc.codegen.triton.delta import delta_scan, delta_scan_backward
from gatecc.codegen.triton.gradients import differentiate
from gatecc.codegen.triton.outputs import mix
from gatecc.codegen.triton.states import scan
from gatecc.codegen.triton.tables import CHUNK, LEVELS, Kernel, Operand, blocks, chunks, operand
from gatecc.ops.linear_attention.problem import Gradients, Problem


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """o: (B, H, N, Dv) and the final state, (S, H, Dk, Dv)."""
    run = _Run(p)
    states, final, written = run.states()
    # As the C kernels do: bfloat16 is rounded here, float16 later; it may overflow before it is normalised.
    o = run.room(p.v.size(3), torch.bfloat16 if p.q.dtype == torch.bfloat16 else torch.float32)
    run.mix(written, o, states)
    return o, final


def backward(p: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients:
    """Gradients in float32 of every tensor of the problem."""
    run = _Run(p)
    if p.beta is None:
        return run.backward(grad_o, grad_state)
    return run.delta_backward(p.beta, grad_o, grad_state)


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three parts, or with ten bits of mantissa, more than a 16-bit input rounds to."""
    if torch.version.hip:
        return "ieee"  # AMD has matrix units for float32
    return "tf32x3" if dtype == torch.float32 else "tf32"


class _Solved(NamedTuple):
    """What ``solve`` finds of the delta rules; without decays ``asks``, yet to be scaled, is q, and
    ``reads`` and ``writes`` are k."""

    beta: Tensor
    asks: Tensor
    scale: float
    reads: Tensor
    writes: Tensor
    kept: Tensor | None
    overlaps: Tensor
    inverses: Tensor


class _Run:
    """One problem and its chunks."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.heads = p.q.size(1)
        self.chunks = chunks(p.segments, p.reverse, p.q.device)

    def backward(self, grad_o: Tensor, grad_state: Tensor) -> Gradients:
        """Without beta: first the states and their gradients, then everything of each chunk on its own."""
        p = self.p
        states, _, _ = self.states()
        grads, dstate = self.scan(p.q, grad_o, grad_state, backward=True)
        dv = self.room(p.v.size(3))
        self.mix(grad_o, dv, grads, backward=True)
        dq, dk, dg = self.differentiate(p.q, p.v, grad_o, states, grads)
        return dq, _ungroup(dk, p.k.size(1)), _ungroup(dv, p.v.size(1)), dg, None, dstate

    def delta_backward(self, beta: Tensor, grad_o: Tensor, grad_state: Tensor) -> Gradients:
        """With beta: what is found missing and its gradient stand where values and theirs stood."""
        p = self.p
        solved = self.solve(beta, backward=True)
        states, _, missing = self.delta_scan(solved)
        du, dmissing, dbeta = (self.room(width) for width in (p.v.size(3), p.v.size(3), 1))
        self.mix(grad_o, du, None, backward=True)
        grads, dstate = self.delta_scan_backward(solved, grad_o, du, dmissing, grad_state)
        written = missing * self.spread(beta)
        dq, dk, dg = self.differentiate(p.q, written, grad_o, states, grads)
        # Keys read the state too, with weights that are subtracted.
        dread, dwrite, more = self.differentiate(p.k, written, dmissing, states, None)
        dk += dread + dwrite
        dg = None if dg is None or more is None else dg + more
        self.strengths(missing, dmissing, du, dbeta, solved.overlaps)
        dk, dv, dbeta = (_ungroup(x, y.size(1)) for x, y in ((dk, p.k), (dmissing, p.v), (dbeta, beta)))
        return dq, dk, dv, dg, dbeta, dstate

    def states(self) -> tuple[Tensor, Tensor, Tensor]:
        """States before each chunk, (chunks, H, Dk, Dv), the final ones, and what is written: v, or u."""
        p = self.p
        if p.beta is None:
            return *self.scan(p.k, p.v, p.state), p.v
        states, final, missing = self.delta_scan(self.solve(p.beta))
        return states, final, missing * self.spread(p.beta)

    def scan(self, x: Tensor, y: Tensor, start: Tensor | None, *, backward: bool = False) -> tuple[Tensor, Tensor]:
        p = self.p
        states, final = self.new_states()
        size, options = self.options("scan")
        grid = (len(p.segments) * self.heads, _cdiv(p.q.size(3), size["BK"]), _cdiv(p.v.size(3), size["BV"]))
        buffers = (start, states, final, self.chunks.table, self.chunks.sequences)
        scale = p.scale if backward else 1.0
        operands = self.operands(x, y, p.log_decay)
        with torch.cuda.device_of(p.q):
            scan[grid](*operands, *buffers, self.heads, scale, BACKWARD=backward, **size, **options)
        return states, final

    def mix(self, y: Tensor, out: Tensor, states: Tensor | None, *, backward: bool = False) -> None:
        p = self.p
        size, options = self.options("mix")
        grid = (self.chunks.count, self.heads, _cdiv(p.v.size(3), size["BV"]))
        operands = self.operands(p.q, p.k, y, p.log_decay, out)
        rest = (states, self.chunks.table, self.heads, p.scale)
        with torch.cuda.device_of(p.q):
            mix[grid](*operands, *rest, BACKWARD=backward, LEVELS=LEVELS, **size, **options)

    def differentiate(
        self, q: Tensor, v: Tensor, grad: Tensor, states: Tensor, grads: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of queries, keys and log decays; without ``grads`` of keys that read, as (q, k, log decays)."""
        p = self.p
        size, options = self.options("differentiate")
        Dk, parts = p.q.size(3), _cdiv(p.q.size(3), size["BK"])
        per_head = p.log_decay is not None and p.log_decay.size(3) == 1
        dq, dk, dg = self.room(Dk), self.room(Dk), None
        if p.log_decay is not None:
            dg = self.room(parts if per_head else Dk)
        operands = self.operands(q, p.k, v, p.log_decay, grad, dq, dk)
        dgate = None if dg is None else operand(dg, self.heads)
        rest = (states, grads, self.chunks.table, self.heads, -1.0 if grads is None else p.scale)
        with torch.cuda.device_of(p.q):
            differentiate[self.chunks.count, self.heads, parts](
                *operands, dgate, *rest, PER_HEAD=per_head, STRICT=grads is None, LEVELS=LEVELS, **size, **options
            )
        if dg is not None and p.log_decay is not None:
            dg = _ungroup(dg.sum(-1, keepdim=True) if per_head else dg, p.log_decay.size(1))
        return dq, dk, dg

    def solve(self, beta: Tensor, *, backward: bool = False) -> _Solved:
        p = self.p
        shape = (self.chunks.count, self.heads, CHUNK, CHUNK)
        overlaps, inverses = (p.q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        asks, reads, writes, kept = p.q, p.k, p.k, None
        if p.log_decay is not None:
            reads, writes = self.room(p.q.size(3)), self.room(p.q.size(3))
            asks = self.room(p.q.size(3)) if backward else p.q
            kept = overlaps.new_empty(*shape[:2], p.q.size(3))
        size, options = self.options("solve")
        del size["DV"], size["BV"]
        operands = self.operands(p.q, p.k, p.log_decay, beta, asks if backward else None, reads, writes)
        rest = (kept, overlaps, inverses, self.chunks.table, self.heads, p.scale)
        with torch.cuda.device_of(p.q):
            solve[self.chunks.count, self.heads](*operands, *rest, LEVELS=LEVELS, **size, **options)
        scale = p.scale if kept is None else 1.0
        return _Solved(beta, asks, scale, reads, writes, kept, overlaps, inverses)

    def delta_scan(self, s: _Solved) -> tuple[Tensor, Tensor, Tensor]:
        p = self.p
        states, final = self.new_states()
        missing = self.room(p.v.size(3))
        size, options = self.options("delta_scan")
        del options["NORMALIZER"]
        grid = (len(p.segments) * self.heads, _cdiv(p.v.size(3), size["BV"]))
        keys, operands = self.operands(s.reads, s.writes), self.operands(p.v, s.beta, missing)
        buffers = (p.state, states, final, s.inverses, self.chunks.table, self.chunks.sequences)
        with torch.cuda.device_of(p.q):
            delta_scan[grid](*keys, s.kept, *operands, *buffers, self.heads, **size, **options)
        return states, final, missing

    def delta_scan_backward(
        self, s: _Solved, grad_o: Tensor, du: Tensor, dmissing: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        p = self.p
        grads, dstate = self.new_states()
        size, options = self.options("delta_scan")
        del options["NORMALIZER"]
        grid = (len(p.segments) * self.heads, _cdiv(p.v.size(3), size["BV"]))
        keys, operands = (
            self.operands(s.asks, s.reads, s.writes),
            self.operands(s.beta, grad_o, du, dmissing),
        )
        buffers = (grad_state, grads, dstate, s.inverses, self.chunks.table, self.chunks.sequences)
        with torch.cuda.device_of(p.q):
            delta_scan_backward[grid](*keys, s.kept, *operands, *buffers, self.heads, s.scale, **size, **options)
        return grads, dstate

    def strengths(self, missing: Tensor, dmissing: Tensor, du: Tensor, dbeta: Tensor, overlaps: Tensor) -> None:
        size, options = self.options("strengths")
        del size["DK"], size["BK"], options["NORMALIZER"]
        operands = self.operands(missing, dmissing, du, dbeta)
        with torch.cuda.device_of(missing):
            strengths[self.chunks.count, self.heads](
                *operands, overlaps, self.chunks.table, self.heads, **size, **options
            )

    def operands(self, *tensors: Tensor | None) -> tuple[Operand | None, ...]:
        return tuple(operand(x, self.heads) for x in tensors)

    def options(self, kernel: Kernel) -> tuple[dict[str, int], dict[str, Any]]:
        """Sizes and constants of a launch."""
        p = self.p
        Dk, Dv = p.q.size(3), p.v.size(3)
        block = blocks(kernel, p.q.dtype, Dk, Dv)
        size = {"DK": Dk, "DV": Dv, "BK": block.keys, "BV": block.values}
        constants = {"C": CHUNK, "REVERSE": p.reverse, "NORMALIZER": p.normalizer, "PRECISION": precision(p.q.dtype)}
        return size, constants | {"num_warps": block.warps, "num_stages": 1}

    def room(self, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, H, N, width), not filled."""
        return self.p.q.new_empty(*self.p.q.shape[:3], width, dtype=dtype)

    def new_states(self) -> tuple[Tensor, Tensor]:
        """States of every chunk, and of every sequence, not filled."""
        final = self.p.new_state()
        return final.new_empty(self.chunks.count, *final.shape[1:]), final

    def spread(self, beta: Tensor) -> Tensor:
        """beta in float32 with every head."""
        return beta.float().repeat_interleave(self.heads // beta.size(1), 1)


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


def _ungroup(grad: Tensor, heads: int) -> Tensor:
    """Gradients of heads that serve a group of queries: (B, H, N, D) -> (B, heads, N, D)."""
    return grad if grad.size(1) == heads else grad.unflatten(1, (heads, -1)).sum(2)
