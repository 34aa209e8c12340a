"""Blocks that the torch.compile backend lowers, against the same blocks compiled by Inductor, on one CPU thread.

``python benchmarks/lowered_blocks.py [SECTION ...] [--check]``; without names, all sections. Both are compiled in this
process and run in turn; ratios are of CPU times, best of several. The row "Inductor / Inductor" is the noise: the same
compiled block taken twice.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from _table import Row, best_of, main
from compile import FIRST_CALL, cpu, first_uses
from torch import Tensor, nn
from torch._inductor import config as inductor

import gatecc

Spelling = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def compared(what: str, block: nn.Module, x: Tensor, bar: float | None, repeats: int) -> Iterator[Row]:
    """How many times as long the block takes under Inductor, with the control and the first calls."""
    torch._dynamo.reset()
    ours, theirs = (torch.compile(block, backend=name, dynamic=False) for name in ("gatecc", "inductor"))
    first: list[float] = []
    with inductor.patch(force_disable_caches=True):  # each compiles from nothing
        for run in (ours, theirs):
            start = cpu()
            run(x)
            first.append(cpu() - start)
    assert torch.allclose(ours(x), theirs(x), rtol=1e-3, atol=1e-4)
    taken = best_of(lambda: ours(x), lambda: theirs(x), lambda: theirs(x), repeats=repeats)
    yield Row(f"{what}: Inductor / gatecc", taken[1] / taken[0], bar, at_most=False)
    yield Row(f"{what}: Inductor / Inductor", taken[1] / taken[2])
    yield Row(f"{what}: first call, gatecc / Inductor", first[0] / first[1], FIRST_CALL)


@torch.no_grad()
def experts() -> Iterator[Row]:
    """MoE blocks of transformers."""
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

    cases = [
        ("512 rows per expert", "grouped_mm", 2048, 512, 1408, 8, 2, 1.05, 5),
        ("E=64 k=8, 128 rows per expert", "grouped_mm", 1024, 256, 704, 64, 8, 1.15, 8),
        ("eager loop over 8 experts", "eager", 512, 256, 704, 8, 2, 1.3, 15),
    ]
    for what, implementation, T, d, hidden, E, k, bar, repeats in cases:
        config = MixtralConfig(hidden_size=d, intermediate_size=hidden, num_local_experts=E, num_experts_per_tok=k)
        config._experts_implementation = implementation
        block = MixtralSparseMoeBlock(config).eval()
        for parameter in block.parameters():
            nn.init.normal_(parameter, std=0.05)
        yield from compared(what, block, torch.randn(1, T, d), bar, repeats)


def token_loop(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    """Gated linear attention token by token. q, k, g: (B, H, N, D), v: (B, H, N, E)."""
    state, out = q.new_zeros(*q.shape[:2], q.size(-1), v.size(-1)), []
    for t in range(q.size(2)):
        state = state * g[:, :, t].exp().unsqueeze(-1) + k[:, :, t].unsqueeze(-1) * v[:, :, t].unsqueeze(-2)
        out.append((q[:, :, t].unsqueeze(-1) * state).sum(-2))
    return torch.stack(out, 2) * q.size(-1) ** -0.5


def chunks(q: Tensor, k: Tensor, v: Tensor, g: Tensor, size: int = 64) -> Tensor:
    """The same in chunks, with a decay of its own for each pair of tokens: exact however strong the gates are."""
    B, H, N, D = q.shape
    q, k, v, g = (x.reshape(B, H, N // size, size, -1) for x in (q * D**-0.5, k, v, g))
    b = g.cumsum(-2)
    before = torch.ones(size, size, dtype=torch.bool).tril()[:, :, None]
    decay = (b.unsqueeze(-2) - b.unsqueeze(-3)).masked_fill(~before, -torch.inf).exp()
    inner = (q.unsqueeze(-2) * k.unsqueeze(-3) * decay).sum(-1) @ v
    q, kept = q * b.exp(), k * (b[..., -1:, :] - b).exp()
    state, out = torch.zeros(B, H, D, v.size(-1)), []
    for c in range(N // size):
        out.append(q[:, :, c] @ state + inner[:, :, c])
        state = state * b[:, :, c, -1].exp().unsqueeze(-1) + kept[:, :, c].transpose(-1, -2) @ v[:, :, c]
    return torch.stack(out, 2).view(B, H, N, -1)


class Mixing(nn.Module):
    """The mixing alone, on q, k, v and gate logits side by side. x: (B, N, 4 H D) -> (B, N, H D)."""

    def __init__(self, spelling: Spelling, heads: int) -> None:
        super().__init__()
        self.spelling, self.heads = spelling, heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, g = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in x.chunk(4, -1))
        return self.spelling(q, k, v, F.logsigmoid(g) / 16).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """A layer of gated linear attention. x: (B, N, C)."""

    def __init__(self, spelling: Spelling, width: int, heads: int) -> None:
        super().__init__()
        self.enter, self.mixing = nn.Linear(width, 4 * width), Mixing(spelling, heads)
        self.leave = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.leave(self.mixing(self.enter(x)))


@torch.no_grad()
def linear_attention() -> Iterator[Row]:
    """Gated linear attention that is written in torch; a loop is as long as Dynamo unrolls it in a minute."""
    yield from compared("mixing in chunks, N=2048", Mixing(chunks, 4), torch.randn(1, 2048, 1024), 10, 8)
    yield from compared("block in chunks, N=2048", Block(chunks, 256, 4), torch.randn(1, 2048, 256), 10, 8)
    yield from compared("mixing token by token, N=64", Mixing(token_loop, 4), torch.randn(1, 64, 1024), 10, 20)


# A section per concern. One that is added stands here, and is run by its name alone as well.
SECTIONS: tuple[Callable[[], Iterator[Row]], ...] = (experts, linear_attention)


def measure(names: list[str]) -> Iterator[Row]:
    """The rows of the sections that are named, of all if none is."""
    first_uses()
    for section in SECTIONS:
        if not names or section.__name__ in names:
            torch.manual_seed(0)
            yield from section()


if __name__ == "__main__":
    known = {section.__name__ for section in SECTIONS}
    chosen = [a for a in sys.argv[1:] if a in known]
    inductor.compile_threads = 1
    assert gatecc.__name__  # registers the operators
    main("lowered_blocks", lambda: list(measure(chosen)), [a for a in sys.argv[1:] if a not in known])
