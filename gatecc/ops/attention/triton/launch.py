"""Calls of attention handed to the kernels: which run, in what order, on which buffers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gatecc.codegen.triton.sizes import block_of, cdiv
from gatecc.ops.attention.arguments import Arguments
from gatecc.ops.attention.kernels import Gradients
from gatecc.ops.attention.triton.kernels.decode import attend_part, join
from gatecc.ops.attention.triton.kernels.forward import attend
from gatecc.ops.attention.triton.kernels.gradients import (
    differentiate_bias,
    differentiate_keys,
    differentiate_queries,
    weigh,
)
from gatecc.ops.attention.triton.lists import BlockMap
from gatecc.ops.attention.triton.tables import Blocks, Kernel, blocks, operand, rule, splits

FEW = 16  # rows, queries times the heads that share keys: up to so many are a step of a decoder


def forward(a: Arguments) -> tuple[Tensor, Tensor]:
    """The result and the logsumexp."""
    run = _Run(a)
    few = a.q.size(2) * run.together <= FEW and (a.blocks is None or a.blocks.size(2) == 1)
    return run.attend_few() if few else run.attend()


def forward_then(a: Arguments, kernel: Any, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """What a printed kernel makes of the heads, and the logsumexp."""
    return _Run(a).attend_then(kernel, others)


def backward(
    a: Arguments, out: Tensor, logsumexp: Tensor, grad: Tensor, grad_logsumexp: Tensor | None, needs: Sequence[bool]
) -> Gradients:
    """Gradients of the six tensors, None where none is needed."""
    run = _Run(a)
    opened, deltas = run.weigh(out, grad, grad_logsumexp)
    dq = dk = dv = dgate = dbias = dsinks = None
    if needs[0] or needs[3]:
        dq, dgate = run.differentiate_queries(grad, opened, logsumexp, deltas, gate=needs[3])
    if needs[1] or needs[2]:
        dk, dv = run.differentiate_keys(opened, logsumexp, deltas)
    if needs[4]:
        dbias = run.differentiate_bias(opened, logsumexp, deltas)
    if needs[5] and a.sinks is not None:  # the weight of a sink, times what its value, 0, lacks
        dsinks = -(torch.exp(a.sinks.float()[:, None] - logsumexp) * deltas).sum((0, 2))
    return dq, dk, dv, dgate, dbias, dsinks


def precision(dtype: torch.dtype) -> str:
    """How float32 is multiplied: in three parts, as exact as float32; 16-bit inputs are multiplied as they are."""
    return "ieee" if torch.version.hip or dtype != torch.float32 else "tf32x3"


class _Run:
    """One call. A method launches the kernel of its name."""

    def __init__(self, a: Arguments) -> None:
        self.a, self.rule = a, rule(a)
        self.B, self.H, self.N, self.D = a.q.shape
        self.S, self.E = a.v.shape[2:]
        self.bias = operand(_scores(a.bias, self.S))
        self.map = None if a.blocks is None else BlockMap.of(a.blocks, a.block_sizes)
        # Heads that read the same keys: those of a group, unless each has blocks of its own.
        self.together = a.group if a.blocks is None or a.blocks.size(1) == 1 else 1

    def attend(self) -> tuple[Tensor, Tensor]:
        """out (B, H, N, E) and the logsumexp (B, H, N)."""
        a, block = self.a, self.blocks("attend")
        out, logsumexp = a.new_output(), a.new_logsumexp()
        given = (*self.operands(a.q, a.k, a.v), self.bias, a.sinks, *self.operands(a.gate, out), logsumexp)
        grid = (cdiv(self.N, block.queries) * self.B * self.H,)
        self.start(attend, block, grid, *given, self.lists(), self.rule)
        return out, logsumexp

    def attend_then(self, kernel: Any, others: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """The same by a kernel that was printed for what is made of the heads (see gatecc.ops.attention.region)."""
        a, block = self.a, self.blocks("attend")
        out, logsumexp = a.new_output(), a.new_logsumexp()
        read = self.operands(*(x[(None,) * (4 - x.dim())] for x in others))
        given = (*self.operands(a.q, a.k, a.v), self.bias, a.sinks, *read, *self.operands(out), logsumexp)
        grid = (cdiv(self.N, block.queries) * self.B * self.H,)
        self.start(kernel, block, grid, *given, self.lists(), self.rule)
        return out, logsumexp

    def attend_few(self) -> tuple[Tensor, Tensor]:
        """The same for few queries: the keys in parts, which are joined."""
        a, block = self.a, self.blocks("attend_part")
        owners = self.B * self.H // self.together
        parts = splits(owners, cdiv(self.seen(), block.keys))
        found = a.q.new_empty(self.B, self.H, self.N, parts, self.E, dtype=torch.float32)
        peaks = found.new_empty(found.shape[:4])
        given = (*self.operands(a.q, a.k, a.v), self.bias, found, peaks, self.lists(), self.rule, parts)
        block = block._replace(queries=block_of(self.N * self.together))
        self.start(attend_part, block, (owners * parts,), *given, TOGETHER=self.together)
        out, logsumexp = a.new_output(), a.new_logsumexp()
        given = (found, peaks, a.sinks, *self.operands(a.gate, out), logsumexp, self.rule, parts)
        grid = (self.B * self.H * self.N,)
        self.start(join, block._replace(warps=4, stages=1), grid, *given, SPLITS=parts)
        return out, logsumexp

    def weigh(self, out: Tensor, grad: Tensor, grad_logsumexp: Tensor | None) -> tuple[Tensor, Tensor]:
        """The gradient of what comes before the gate, and what the gradients of a query's scores have in common."""
        a, block = self.a, self.blocks("weigh")
        opened = grad if a.gate is None else torch.empty_like(out)
        deltas = a.q.new_empty(self.B, self.H, self.N, dtype=torch.float32)
        more = None if grad_logsumexp is None else grad_logsumexp.contiguous()
        given = (*self.operands(out, grad, a.gate), more, *self.operands(opened), deltas, self.rule)
        grid = (cdiv(self.N, block.queries) * self.B * self.H,)
        self.start(weigh, block, grid, *given)
        return opened, deltas

    def differentiate_queries(
        self, grad: Tensor, opened: Tensor, logsumexp: Tensor, deltas: Tensor, *, gate: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Gradients of q and, if asked for, of the gate."""
        a, block = self.a, self.blocks("differentiate_queries")
        dq, dgate = torch.empty_like(a.q), torch.empty_like(a.gate) if gate and a.gate is not None else None
        given = (*self.operands(a.q, a.k, a.v), self.bias, *self.operands(a.gate, grad, opened), logsumexp, deltas)
        grid = (cdiv(self.N, block.queries) * self.B * self.H,)
        rest = (*self.operands(dq, dgate), self.lists(), self.rule)
        self.start(differentiate_queries, block, grid, *given, *rest)
        return dq, dgate

    def differentiate_keys(self, opened: Tensor, logsumexp: Tensor, deltas: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of k and v."""
        a, block = self.a, self.blocks("differentiate_keys")
        dk, dv = torch.empty_like(a.k), torch.empty_like(a.v)
        given = (*self.operands(a.q, a.k, a.v), self.bias, *self.operands(opened), logsumexp, deltas)
        grid = (cdiv(self.S, block.keys) * self.B * a.k.size(1),)
        lists = self.lists(of_keys=True)
        self.start(differentiate_keys, block, grid, *given, *self.operands(dk, dv), lists, self.rule)
        return dk, dv

    def differentiate_bias(self, opened: Tensor, logsumexp: Tensor, deltas: Tensor) -> Tensor | None:
        """The gradient of the bias."""
        a, block = self.a, self.blocks("differentiate_bias")
        bias = _scores(a.bias, self.S)
        if a.bias is None or bias is None:
            return None
        dbias = bias.new_empty(bias.shape)
        flags = None if self.map is None else self.map.at.view(torch.uint8)
        own_batches, own_heads, rows, _ = bias.shape
        per_query = rows > 1
        chunk = min(block_of(max(self.D, self.E)), 128 // a.q.element_size())
        down = cdiv(self.N, block.queries) if per_query else 1
        grid = (cdiv(self.S, block.keys) * down * own_batches * own_heads,)
        given = (*self.operands(a.q, a.k, a.v), self.bias, *self.operands(opened), logsumexp, deltas)
        rest = (*self.operands(dbias, flags), self.rule, self.B // own_batches, self.H // own_heads)
        self.start(
            differentiate_bias,
            block,
            grid,
            *given,
            *rest,
            PER_QUERY=per_query,
            CHUNK=chunk,
        )
        return dbias if a.bias.size(3) == self.S else dbias.sum(3, keepdim=True)

    def start(self, kernel: Any, block: Blocks, grid: tuple[int, ...], *given: Any, **constants: Any) -> None:
        """Launch a kernel with those of the call's constants that it has."""
        known: dict[str, Any] = {"D": self.D, "E": self.E, "BD": block_of(self.D), "BE": block_of(self.E)}
        known |= {"BM": block.queries, "BN": block.keys, "PRECISION": precision(self.a.q.dtype)}
        known |= {"LIST_Q": block.queries, "LIST_K": block.keys, "ACTIVATION": self.a.gate_activation}
        known |= {"PER_HEAD": self.a.gate is not None and self.a.gate.size(3) == 1}
        if self.map is not None:
            known |= {"LIST_Q": self.map.queries, "LIST_K": self.map.keys}
        constants |= {name: x for name, x in known.items() if name in kernel.arg_names}
        with torch.cuda.device_of(self.a.q):
            kernel[grid](*given, **constants, num_warps=block.warps, num_stages=block.stages)

    def blocks(self, kernel: Kernel) -> Blocks:
        """The blocks of a kernel, no larger than what there is."""
        most = blocks(kernel, self.a.q.dtype, max(block_of(self.D), block_of(self.E)))
        if kernel == "differentiate_queries" and self.bias is not None:  # a block of it is held beside four products
            most = most._replace(queries=max(16, most.queries // 2), stages=1)
        found = most._replace(queries=block_of(self.N, most.queries), keys=block_of(self.S, most.keys))
        if self.map is not None:  # a program takes parts of blocks of the map, never of two
            found = found._replace(
                queries=math.gcd(found.queries, self.map.queries), keys=math.gcd(found.keys, self.map.keys)
            )
        return found

    def lists(self, *, of_keys: bool = False) -> Any:
        """The map of blocks as lists, if there is one."""
        return None if self.map is None else self.map.lists(self.rule, of_keys=of_keys)

    def operands(self, *tensors: Tensor | None) -> tuple[Any, ...]:
        return tuple(map(operand, tensors))

    def seen(self) -> int:
        """How many keys queries see at most."""
        if self.a.window is None:
            return self.S
        return min(self.S, (self.a.window if self.a.causal else 2 * self.a.window) + self.N)


def _scores(bias: Tensor | None, S: int) -> Tensor | None:
    """The bias with every key; booleans as bytes."""
    if bias is None:
        return None
    bias = bias.view(torch.uint8) if bias.dtype == torch.bool else bias
    return bias.expand(*bias.shape[:3], S)
