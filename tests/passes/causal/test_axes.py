"""Which values are made token by token, and along which axes a graph treats all places alike.

What the rules say of a graph is held against what running it shows: at narrow sizes it computes what the function does
of narrow inputs, and a value that is said to have tokens changes at a changed token alone.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from gatecc.ir.dataflow import Flow
from gatecc.ir.program import Program
from gatecc.passes.causal.narrow import Narrow
from gatecc.passes.causal.settled import Settled
from gatecc.passes.trial import Trial
from tests.graphs import program_of, record

B, H, N, D, E = 3, 4, 11, 8, 10
Q, V = (B, H, N, D), (B, H, N, E)


def captured(function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> Program:
    """With sizes that are numbers."""
    generator = torch.Generator().manual_seed(0)
    return program_of(function, *(torch.randn(shape, generator=generator) for shape in shapes), dynamic="none")


def norms(q: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bhnd,bhmd->bhnm", q, q).tril()
    return (scores @ v) / (scores.sum(-1, keepdim=True).abs() + 1)


def loop(q: Tensor, v: Tensor) -> Tensor:
    state, out = q.new_zeros(q.size(0), q.size(1), q.size(3), v.size(3)), torch.zeros_like(v)
    for t in range(q.size(2)):
        state = state * 0.5 + q[:, :, t, :, None] * v[:, :, t, None]
        out[:, :, t] = (state * q[:, :, t].unsqueeze(-1)).sum(-2)
    return out


def lists(q: Tensor, v: Tensor) -> Tensor:
    tokens = [a.unsqueeze(-1) @ b.unsqueeze(-2) for a, b in zip(q.unbind(2), v.unbind(2), strict=True)]
    return torch.stack(tokens, 2).cumsum(2)


def sliced(q: Tensor, v: Tensor) -> Tensor:
    return torch.cat([F.pad(q, (0, 0, 1, 0))[:, :, :-1], v[..., 2:].softmax(-1)], -1)


def halves(q: Tensor, v: Tensor) -> Tensor:
    one, other = q.chunk(2, -1)
    return torch.cat([-other, one], -1) @ (q.mT @ v) + F.layer_norm(v, (v.size(-1),))


def middle(q: Tensor, v: Tensor) -> Tensor:
    return (q - q.mean(-1, keepdim=True)).transpose(1, 2).reshape(q.size(0), q.size(2), -1)


# The sizes of both inputs. Batch, heads, features of q, of v: 2, 4, 5, 6 as they are met, or what they are.
NARROW: dict[Callable[[Tensor, Tensor], Tensor], tuple[list[int], list[int]]] = {
    norms: ([2, 4, N, 5], [2, 4, N, 6]),
    loop: ([2, 4, N, 5], [2, 4, N, 6]),
    lists: ([2, 4, N, 5], [2, 4, N, 6]),
    sliced: ([2, 4, N, D], [2, 4, N, E]),  # features are joined, those of v cut
    halves: ([2, 4, N, D], [2, 4, N, E]),  # those of q cut, those of v meant
    middle: ([2, H, N, D], [*V]),  # heads and features become one axis; v is not read
}


@pytest.mark.parametrize("function", NARROW)
def test_narrow_sizes(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = captured(function, Q, V)
    q, v = program.placeholders
    nodes = [n for n in program.graph.nodes if n.op not in ("placeholder", "output")]
    narrow = Narrow(nodes, [(q, 2), (v, 2)])
    assert narrow
    assert narrow.sizes(q) == NARROW[function][0]
    assert sorted(narrow.sizes(v)) == sorted(NARROW[function][1])
    inputs = [torch.randn(narrow.sizes(x), dtype=torch.float64) for x in (q, v)]
    trial = Trial(program, dict(zip((q, v), inputs, strict=True)), lambda name, held: None, shapes=narrow.argument)
    for node in nodes:
        trial.step(node)
    (out,) = (n for n in program.outputs if isinstance(n, fx.Node))
    assert torch.allclose(trial[out], function(*inputs), rtol=1e-12, atol=1e-12)
    assert list(trial[out].shape) == narrow.sizes(out)


@pytest.mark.parametrize("function", [*NARROW, lambda q, v: q.flatten(0, 1) @ v.flatten(0, 1).mT[:, :D]])
def test_what_is_settled_changes_at_its_token_alone(function: Callable[[Tensor, Tensor], Tensor]) -> None:
    program = captured(function, Q, V)
    settled = Settled(Flow(program), list(program.graph.nodes), dict.fromkeys(program.placeholders, 2))
    values = record(program)
    program.example = [x.clone() for x in program.example]
    for x in program.example:
        x[:, :, 4] = torch.randn(x[:, :, 4].shape)
    after = record(program)
    for node, axis in settled.axes.items():
        differs = (values[node] != after[node]).movedim(axis, 0).flatten(1).any(1)
        assert differs.nonzero().flatten().tolist() == [4], node
    assert function is middle or any(n not in settled.axes for n in program.calls())


def test_projections_and_what_is_done_per_token_is_settled() -> None:
    def rotated(x: Tensor, w: Tensor, place: Tensor) -> Tensor:
        q = F.rms_norm(F.linear(x, w).unflatten(-1, (H, D)), (D,)).transpose(1, 2)
        one, other = q.chunk(2, -1)
        q = q * place.cos() + torch.cat([-other, one], -1) * place.sin()
        return (q @ q.transpose(-1, -2)).tril() @ q

    program = captured(rotated, (B, N, 16), (H * D, 16), (N, D))
    x = program.placeholders[0]
    settled = Settled(Flow(program), list(program.graph.nodes), {x: 1})
    left = [str(n.target) for n in settled.needed([n for n in program.calls() if n not in settled.axes])]
    found = [n for n in program.calls() if n not in settled.axes and n.name.startswith(("matmul", "transpose", "tril"))]
    assert [settled.axes[n] for n in settled.axes if n.name.startswith("add")] == [2]
    assert len([n for n in left if "linear" in n or "rms_norm" in n or "cat" in n]) == 0
    assert {n.name for n in found} >= {"matmul", "matmul_1", "tril"}
