"""Attention that looks at chosen blocks alone: ``python examples/sparse_attention.py --model FOLDER``.

FOLDER holds a language model over bytes as transformers saves it (trained at 512 bytes). Gates of blocks
(SeerAttention) are trained beside its frozen weights, each towards the largest attention weight in every block. Then:
bits per byte on held-out source against the share of blocks that is kept. The same for recall of key-value pairs (MQAR)
at 2048 tokens, by a small model that is trained here. At last the time of one attention layer against the length.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatecc
from gatecc.ops.block_gate import block_choice, block_logits
from gatecc.train import Tune, heal, tasks

GATES = ("gate.query", "gate.key")
SHARES = (1.0, 0.75, 0.5, 0.25)
RECALL: dict[str, Any] = {"vocabulary": 256, "pairs": 32, "fill": False}
console = Console(highlight=False)


def gated(model: nn.Module, inputs: Any, block: int, by_token: bool) -> nn.Module:
    """A copy of a model with gates, which keep all blocks at first; tokens choose them, or blocks of queries."""
    recipe = gatecc.recipe("seer-attention", block=block, width=16, threshold=0.0, pool_queries=not by_token)
    return gatecc.transform(model, recipe, inputs)


def kept(model: nn.Module, inputs: Any) -> float:
    """The share of the blocks of keys that a run computes, of those that queries may see."""
    rows = [row for row in gatecc.cost(model, inputs, rounds=0).taken if row.kind == "block of keys"]
    return sum(sum(row.counts) for row in rows) / sum(row.of * len(row.counts) for row in rows)


def keep(model: nn.Module, share: float, inputs: Any) -> float:
    """Set the threshold of all gates such that a run keeps at most this share of the blocks; what it keeps."""
    cuts = [b for name, b in model.named_buffers() if name.endswith("gate.cut")]
    low, high, found = 0.0, 1.0, 1.0
    for number in range(14):
        middle = (low + high) / 2 if number else 0.0
        for cut in cuts:
            cut.fill_(middle)
        found = kept(model, inputs)
        if found <= share and not number:
            break
        low, high = (low, middle) if found <= share else (middle, high)
    for cut in cuts if found > share else ():
        cut.fill_(high)
    return found if found <= share else kept(model, inputs)


def train_gates(model: nn.Module, data: Iterator[Any], steps: int, loss: Callable[[Any, Any], Tensor]) -> None:
    """The gates alone learn, in training mode, where attention is dense and each gate has a loss of its own."""
    for p in model.parameters():
        p.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_(name.endswith(GATES))
    stage = Tune(steps, lr=5e-3, train=tuple(f"*{name}" for name in GATES), loss=loss)
    heal(model, None, list(data), tune=stage, progress=False)


class Recall(nn.Module):
    """A model that can recall pairs: a short convolution joins each value to its key, one attention looks it up."""

    def __init__(self, vocabulary: int, width: int = 64) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.mix = nn.Conv1d(width, width, 2, groups=width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """ids: (B, N) -> logits (B, N, V)"""
        x = self.embed(ids)
        y = self.norm1(x)
        y = y + self.mix(F.pad(y.transpose(1, 2), (1, 0))).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(y).chunk(3, -1))
        heads = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(self.norm2(x + self.out(heads.transpose(1, 2).flatten(2))))


def pairs(length: int, steps: int, batch: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of MQAR: ids and labels."""
    for step in range(steps):
        yield tasks.mqar(length=length, seed=seed + step, batch=batch, **RECALL)


def recaller(steps: int, length: int) -> nn.Module:
    """A small model that learns to recall at short lengths first, then at ``length``."""
    torch.manual_seed(0)
    model = Recall(RECALL["vocabulary"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    for short, share, batch in ((length // 16, 1.0, 16), (length, 0.1, 2)):
        for ids, labels in pairs(short, max(1, int(share * steps)), batch, seed=short):
            loss = F.cross_entropy(model(ids).flatten(0, 1), labels.flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return model.eval()


@torch.no_grad()
def recalled(model: nn.Module, length: int, batches: int = 4) -> float:
    """The share of queries that are answered rightly."""
    found = [tasks.recall(model(ids), labels) for ids, labels in pairs(length, batches, 4, seed=10**6)]
    return sum(found) / len(found)


def on_bytes(folder: Path, steps: int, windows: int, by_token: bool, block: int = 32) -> dict[str, float]:
    """Bits per byte at 512 bytes: dense, and by the share of blocks that is kept."""
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(folder).eval()
    train, held = tasks.stdlib_bytes()
    call = {"input_ids": torch.zeros(2, 128, dtype=torch.long), "use_cache": False}
    student = gated(plain, call, block, by_token)
    data = ({"input_ids": x, "use_cache": False} for x in tasks.windows_of(train, 512, 2 * steps).split(2))
    train_gates(student, data, steps, lambda out, batch: out.logits.float().square().mean() * 0)

    def bits(model: Any) -> float:
        return tasks.bits_per_token(lambda x: model(x, use_cache=False).logits, held, 512, windows)

    found = {"dense": bits(plain)}
    some = {"input_ids": tasks.windows_of(train, 512, 2, seed=1), "use_cache": False}
    for share in SHARES:
        share = keep(student, share, some)
        found[f"{share:.0%}"] = bits(student)
    return found


def on_pairs(steps: int, gate_steps: int, length: int, by_token: bool, block: int = 64) -> dict[str, float]:
    """Recall at ``length``: dense, and by the share of blocks that is kept."""
    plain = recaller(steps, length)
    call = (torch.zeros(2, 256, dtype=torch.long),)
    student = gated(plain, call, block, by_token)
    data = (ids for ids, _ in pairs(length, gate_steps, 2, seed=10**5))
    train_gates(student, data, gate_steps, lambda out, batch: out.square().mean() * 0)
    found = {"dense": recalled(plain, length)}
    some = (next(pairs(length, 1, 2, seed=10**4))[0],)
    for share in SHARES:
        share = keep(student, share, some)
        found[f"{share:.0%}"] = recalled(student, length)
    return found


def on_time(length: int, share: float, block: int = 64, heads: int = 4) -> tuple[float, float]:
    """Seconds of one causal attention: dense by torch, and by a gate with the blocks that it chooses."""
    q, k, v = torch.randn(3, 1, heads, length, 64).unbind()
    query, key = torch.randn(2, heads, 192, 32).unbind()

    def sparse() -> Tensor:
        blocks = block_choice(block_logits(q, k, query, key, None, block), torch.tensor(share), None, block, True, True)
        options: dict[str, Any] = {"causal": True, "blocks": blocks, "block_sizes": [block, block]}
        return torch.ops.gatecc.attention(q, k, v, **options)[0]

    works = (lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True)), sparse
    return tuple(min(_seconds(work) for _ in range(3)) for work in works)  # pyright: ignore[reportReturnType]


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def show(title: str, figures: dict[str, float], better: str) -> None:
    """A table of figures beside the dense one."""
    table = Table(title=title)
    for column in ("blocks kept", better, "of dense"):
        table.add_column(column, justify="right")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4f}", f"{value / max(figures['dense'], 1e-9):.4f}")
    console.print(table)


def main(
    model: Annotated[Path | None, typer.Option(help="Folder of a language model over bytes.")] = None,
    steps: Annotated[int, typer.Option(help="Steps of 1024 bytes to train its gates.")] = 200,
    windows: Annotated[int, typer.Option(help="Held-out windows of 512 bytes to measure on.")] = 30,
    recall_steps: Annotated[int, typer.Option(help="Steps to train the model that recalls pairs; 0: leave out.")] = 800,
    gate_steps: Annotated[int, typer.Option(help="Steps to train its gates.")] = 30,
    length: Annotated[int, typer.Option(help="Length of the recall task.")] = 2048,
    by_token: Annotated[bool, typer.Option(help="Each token chooses, as in a decoder.")] = False,
    longest: Annotated[int, typer.Option(help="Longest attention to time.")] = 8192,
) -> None:
    """Train gates of blocks, and show quality and time."""
    if model is not None:
        show("bits per byte, 512 bytes in blocks of 32", on_bytes(model, steps, windows, by_token), "bits per byte")
    if recall_steps:
        show(f"recall at {length} in blocks of 64", on_pairs(recall_steps, gate_steps, length, by_token), "recall")
    table = Table(title="one attention of 4 heads, CPU seconds")
    for column in ("tokens", "dense", "10 % kept", "times the speed"):
        table.add_column(column, justify="right")
    at = 1024
    with torch.no_grad():
        while at <= longest:
            dense, sparse = on_time(at, 0.1)
            table.add_row(str(at), f"{dense:.4f}", f"{sparse:.4f}", f"{dense / sparse:.2f}")
            at *= 2
    console.print(table)


if __name__ == "__main__":
    typer.run(main)
