"""Problems of linear attention handed to the kernels: which run, in what order, on which buffers."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from gatecc.codegen.triton.sizes import cdiv
from gatecc.ops.linear_attention.layout import room
from gatecc.ops.linear_attention.problem import Gradients, Problem
from gatecc.ops.linear_attention.triton.kernels.corrections import solve, strengths
from gatecc.ops.linear_attention.triton.kernels.delta import delta_scan, delta_scan_backward
from gatecc.ops.linear_attention.triton.kernels.gradients import differentiate
from gatecc.ops.linear_attention.triton.kernels.outputs import mix
from gatecc.ops.linear_attention.triton.kernels.states import scan
from gatecc.ops.linear_attention.triton.tables import CHUNK, LEVELS, Blocks, Kernel, Operand, blocks, chunks, operand


def forward(p: Problem) -> tuple[Tensor, Tensor]:
    """o: (B, H, N, Dv) and the final state, (S, H, Dk, Dv)."""
    run = _Run(p)
    if p.beta is None:
        (states, final), written = run.scan(p.k, p.v, p.state), p.v
    else:
        states, final, missing = run.delta_scan(run.solve(p.beta))
        written = missing * run.spread(p.beta)
    # As the C kernels do: bfloat16 is rounded here, float16 later; it may overflow before it is normalised.
    o = run.room(p.v.size(3), p.q, torch.bfloat16 if p.q.dtype == torch.bfloat16 else torch.float32)
    run.mix(written, o, states)
    return o, final


def backward(p: Problem, grad_o: Tensor, grad_state: Tensor) -> Gradients:
    """Gradients in float32 of every tensor of the problem: first states and theirs, then each chunk on its own."""
    run = _Run(p)
    if p.beta is not None:
        return _delta_backward(run, p.beta, grad_o, grad_state)
    states, _ = run.scan(p.k, p.v, p.state)
    grads, dstate = run.scan(p.q, grad_o, grad_state, backward=True)
    dv = run.room(p.v.size(3), p.v)
    run.mix(grad_o, dv, grads, backward=True)
    dq, dk, dg = run.differentiate(p.q, p.v, grad_o, states, grads)
    return dq, _ungroup(dk, p.k.size(1)), _ungroup(dv, p.v.size(1)), dg, None, dstate


def _delta_backward(run: _Run, beta: Tensor, grad_o: Tensor, grad_state: Tensor) -> Gradients:
    """What is found missing and its gradient stand where values and theirs stood."""
    p = run.p
    solved = run.solve(beta, backward=True)
    states, _, missing = run.delta_scan(solved)
    du, dmissing, dbeta = run.room(run.Dv), run.room(run.Dv, p.v), run.room(1)
    run.mix(grad_o, du, None, backward=True)
    grads, dstate = run.delta_scan_backward(solved, grad_o, du, dmissing, grad_state)
    written = missing * run.spread(beta)
    dq, dk, dg = run.differentiate(p.q, written, grad_o, states, grads)
    # Keys read the state too, with weights that are subtracted.
    dread, dwrite, more = run.differentiate(p.k, written, dmissing, states, None)
    dg = None if dg is None or more is None else dg + more
    run.strengths(missing, dmissing, du, dbeta, solved.overlaps)
    pairs = ((dk + dread + dwrite, p.k), (dmissing, p.v), (dbeta, beta))
    dk, dv, dbeta = (_ungroup(grad, x.size(1)) for grad, x in pairs)
    return dq, dk, dv, dg, dbeta, dstate


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three parts, or with ten bits of mantissa, no fewer than a 16-bit input has."""
    if torch.version.hip:
        return "ieee"  # AMD has matrix units for float32
    return "tf32x3" if dtype == torch.float32 else "tf32"


class _Solved(NamedTuple):
    """What ``solve`` finds. Without decays reads and writes are k, and asks is q, yet to be scaled."""

    beta: Tensor
    asks: Tensor
    scale: float
    reads: Tensor
    writes: Tensor
    kept: Tensor | None
    overlaps: Tensor
    inverses: Tensor


class _Run:
    """One problem, cut into chunks. A method launches the kernel of its name."""

    def __init__(self, p: Problem) -> None:
        self.p = p
        self.heads, self.Dk, self.Dv = p.q.size(1), p.q.size(3), p.v.size(3)
        self.chunks = chunks(p.segments, p.reverse, p.q.device)

    def scan(self, x: Tensor, y: Tensor, start: Tensor | None, *, backward: bool = False) -> tuple[Tensor, Tensor]:
        """States before each chunk (backward: gradients after), (chunks, H, Dk, Dv), and the last, (S, H, Dk, Dv)."""
        states, final = self.new_states()
        # Left to itself ptxas gives kernels in the tensor memory of sm_100 64 registers, and spills, if they are small.
        block = self.blocks("scan" if self.p.log_decay is not None else "plain_scan")
        grid = (self.sequences(), cdiv(self.Dk, block.keys), cdiv(self.Dv, block.values))
        operands = self.operands(x, y, self.p.log_decay)
        buffers = (start, states, final, self.chunks.table, self.chunks.sequences)
        self.start(
            scan, block, grid, *operands, *buffers, self.heads, self.p.scale if backward else 1.0, BACKWARD=backward
        )
        return states, final

    def mix(self, y: Tensor, out: Tensor, states: Tensor | None, *, backward: bool = False) -> None:
        """Fill ``out``."""
        p, block = self.p, self.blocks("mix")
        grid = (self.chunks.number, self.heads, cdiv(self.Dv, block.values))
        operands = self.operands(p.q, p.k, y, p.log_decay, out)
        self.start(mix, block, grid, *operands, states, self.chunks.table, self.heads, p.scale, BACKWARD=backward)

    def differentiate(
        self, q: Tensor, v: Tensor, grad: Tensor, states: Tensor, grads: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Gradients of queries, keys and log decays. Without ``grads`` q are keys that read, with a minus."""
        p, block = self.p, self.blocks("differentiate")
        parts = cdiv(self.Dk, block.keys)
        per_head = p.log_decay is not None and p.log_decay.size(3) == 1
        dq, dk = self.room(self.Dk, q), self.room(self.Dk, p.k)
        dg = None if p.log_decay is None else self.room(parts if per_head else self.Dk, p.log_decay)
        operands = self.operands(q, p.k, v, p.log_decay, grad, dq, dk, dg)
        rest = (states, grads, self.chunks.table, self.heads, -1.0 if grads is None else p.scale)
        grid = (self.chunks.number, self.heads, parts)
        self.start(differentiate, block, grid, *operands, *rest, PER_HEAD=per_head, STRICT=grads is None)
        if dg is not None and p.log_decay is not None:
            dg = _ungroup(dg.sum(-1, keepdim=True) if per_head else dg, p.log_decay.size(1))
        return dq, dk, dg

    def solve(self, beta: Tensor, *, backward: bool = False) -> _Solved:
        """What a delta rule needs of each chunk before the states are known."""
        p = self.p
        shape = (self.chunks.number, self.heads, CHUNK, CHUNK)
        overlaps, inverses = (p.q.new_empty(shape, dtype=torch.float32) for _ in range(2))
        asks, reads, writes, kept, scale = p.q, p.k, p.k, None, p.scale
        if p.log_decay is not None:
            reads, writes, scale = self.room(self.Dk), self.room(self.Dk), 1.0
            asks = self.room(self.Dk) if backward else p.q
            kept = overlaps.new_empty(*shape[:2], self.Dk)
        operands = self.operands(p.q, p.k, p.log_decay, beta, asks if backward else None, reads, writes)
        rest = (kept, overlaps, inverses, self.chunks.table, self.heads, p.scale)
        self.start(solve, self.blocks("solve"), shape[:2], *operands, *rest)
        return _Solved(beta, asks, scale, reads, writes, kept, overlaps, inverses)

    def delta_scan(self, s: _Solved) -> tuple[Tensor, Tensor, Tensor]:
        """As ``scan``, and what was found missing, (B, H, N, Dv)."""
        states, final = self.new_states()
        missing = self.room(self.Dv)
        block = self.blocks("delta_scan")
        keys, operands = self.operands(s.reads, s.writes), self.operands(self.p.v, s.beta, missing)
        buffers = (self.p.state, states, final, s.inverses, self.chunks.table, self.chunks.sequences)
        grid = (self.sequences(), cdiv(self.Dv, block.values))
        self.start(delta_scan, block, grid, *keys, s.kept, *operands, *buffers, self.heads)
        return states, final, missing

    def delta_scan_backward(
        self, s: _Solved, grad_o: Tensor, du: Tensor, dmissing: Tensor, grad_state: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As ``scan`` backward; completes ``du`` and fills ``dmissing``."""
        grads, dstate = self.new_states()
        block = self.blocks("delta_scan")
        keys, operands = self.operands(s.asks, s.reads, s.writes), self.operands(s.beta, grad_o, du, dmissing)
        buffers = (grad_state, grads, dstate, s.inverses, self.chunks.table, self.chunks.sequences)
        grid = (self.sequences(), cdiv(self.Dv, block.values))
        self.start(delta_scan_backward, block, grid, *keys, s.kept, *operands, *buffers, self.heads, s.scale)
        return grads, dstate

    def strengths(self, missing: Tensor, dmissing: Tensor, du: Tensor, dbeta: Tensor, overlaps: Tensor) -> None:
        """Fill ``dbeta``."""
        operands = self.operands(missing, dmissing, du, dbeta)
        grid = (self.chunks.number, self.heads)
        self.start(strengths, self.blocks("strengths"), grid, *operands, overlaps, self.chunks.table, self.heads)

    def start(self, kernel: Any, block: Blocks, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        """Launch a kernel with those of the problem's constants that it has."""
        p = self.p
        known: dict[str, Any] = {
            "DK": self.Dk,
            "DV": self.Dv,
            "BK": block.keys,
            "BV": block.values,
            "C": CHUNK,
            "LEVELS": LEVELS,
        }
        known |= {"REVERSE": p.reverse, "NORMALIZER": p.normalizer, "PRECISION": precision(p.q.dtype)}
        constants |= {name: x for name, x in known.items() if name in kernel.arg_names}
        with torch.cuda.device_of(p.q):
            kernel[grid](*given, **constants, **block.options)

    def blocks(self, kernel: Kernel) -> Blocks:
        return blocks(kernel, self.p.q.dtype, self.Dk, self.Dv)

    def operands(self, *tensors: Tensor | None) -> tuple[Operand | None, ...]:
        return tuple(operand(x, self.heads) for x in tensors)

    def sequences(self) -> int:
        """Sequences of all heads: the programs that go through tokens in order."""
        return len(self.p.segments) * self.heads

    def room(self, width: int, like: Tensor | None = None, dtype: torch.dtype = torch.float32) -> Tensor:
        """(B, H, N, width), not filled; a result lies as what it is ``like`` does."""
        return room(self.p.q if like is None else like, width, dtype, self.heads)

    def new_states(self) -> tuple[Tensor, Tensor]:
        """States of every chunk, and of every sequence, not filled."""
        final = self.p.new_state()
        return final.new_empty(self.chunks.number, *final.shape[1:]), final

    def spread(self, beta: Tensor) -> Tensor:
        """beta in float32 with every head."""
        return beta.float().repeat_interleave(self.heads // beta.size(1), 1)


def _ungroup(grad: Tensor, heads: int) -> Tensor:
    """Gradients of heads that serve a group of queries: (B, H, N, D) -> (B, heads, N, D)."""
    return grad if grad.size(1) == heads else grad.unflatten(1, (heads, -1)).sum(2)
