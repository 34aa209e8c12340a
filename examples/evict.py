"""A decoder that lets go of tokens: ``python examples/evict.py --model FOLDER``.

FOLDER holds a language model over bytes as transformers saves it (trained at 512 bytes). Gates of the recipe
attention-gate are trained beside its frozen weights: each key head of each layer says which tokens later ones will
need; the newest 32 are held whatever it says. Then, by the share of tokens that is held: bits per byte on held-out
source, and what the derived decoder holds after 512 bytes and takes for one more. Beside it a window: the same number
of tokens, the newest ones.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import gatecc
from gatecc.train import Tune, heal, tasks

LENGTH, RECENT = 512, 32
SHARES = (1.0, 0.75, 0.5, 0.25)
console = Console(highlight=False)


class Figures(NamedTuple):
    """Of one share: bits per byte, bytes of the decoder's cache, CPU seconds of a step."""

    share: float
    bits: float
    size: int
    seconds: float


def train_gates(model: nn.Module, train: Tensor, steps: int, length: int, batch: int = 2) -> None:
    """The gates alone learn, from what the model predicts with what they keep, and from how much they keep."""
    data = [{"input_ids": x, "use_cache": False} for x in tasks.windows_of(train, length, batch * steps).split(batch)]
    stage = Tune(steps, lr=2e-2, train=("*self_attn.gate.*",), loss=predicted)
    heal(model, None, data, tune=stage, progress=False)


def predicted(output: Any, batch: dict[str, Any]) -> Tensor:
    """The cross entropy of the next bytes."""
    return F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["input_ids"][:, 1:].flatten())


def kept(model: nn.Module, inputs: Any) -> float:
    """The share of tokens that key heads hold behind the last one."""
    rows = [row for row in gatecc.cost(model, inputs, rounds=0).taken if row.kind == "kept token"]
    return sum(sum(row.counts) for row in rows) / sum(row.of * len(row.counts) for row in rows)


def keep(model: nn.Module, share: float, inputs: Any) -> float:
    """Set the cut of all gates such that about this share of the tokens is held at the end; the share that is."""
    cuts = [b for name, b in model.named_buffers() if name.endswith("self_attn.gate.cut")]
    low, high, found = 0.0, 1.0, 1.0
    for _ in range(10 if share < 1 else 1):
        middle = (low + high) / 2 if share < 1 else -1.0
        for cut in cuts:
            cut.fill_(middle)
        found = kept(model, inputs)
        low, high = (low, middle) if found < share else (middle, high)
    return found


def footprint(model: nn.Module, text: Tensor, repeats: int = 10) -> tuple[int, float]:
    """Bytes that the decoder holds after a text (1, N), and CPU seconds of one more byte."""
    made = gatecc.decoder(model, {"input_ids": text[:, :32], "use_cache": False}, capacity=text.size(1) + repeats)
    logits, state = made.prefill(text)
    token = logits[:, -1].argmax(-1)
    held = made.memory.bytes(state)

    def step() -> None:
        """Behind the last one: a state that is stepped twice is copied."""
        nonlocal state
        _, state = made.step(token, state)

    return held, min(_seconds(step) for _ in range(repeats))


def _seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def measure(plain: Any, model: Any, held: Tensor, some: Tensor, windows: int, length: int) -> list[Figures]:
    """The dense model, and the gated one by the share that is kept."""

    def bits(model: Any) -> float:
        return tasks.bits_per_token(lambda x: model(x, use_cache=False).logits, held, length, windows)

    text = held[:length].long().unsqueeze(0)
    found = [Figures(1.0, bits(plain), *footprint(plain, text))]
    for share in SHARES:
        real = keep(model, share, {"input_ids": some, "use_cache": False})
        found.append(Figures(real, bits(model), *footprint(model, text)))
    return found


def windowed(plain: nn.Module, size: int, held: Tensor, windows: int, length: int) -> float:
    """Bits per byte where every head keeps the newest ``size`` bytes: a budget, with flags that say nothing."""
    inputs = {"input_ids": torch.zeros(1, 32, dtype=torch.long), "use_cache": False}
    model: Any = gatecc.transform(plain, gatecc.recipe("attention-gate", budget=size), inputs)
    return tasks.bits_per_token(lambda x: model(x, use_cache=False).logits, held, length, windows)


def on_bytes(
    plain: Any, train: Tensor, held: Tensor, steps: int, windows: int, length: int = LENGTH, recent: int = RECENT
) -> list[Figures]:
    """Train gates of a model, and measure it."""
    call = {"input_ids": torch.zeros(2, 32, dtype=torch.long), "use_cache": False}
    recipe = gatecc.recipe("attention-gate", target=0.5, weight=2.0, bias=1.0, recent=recent)
    model = gatecc.transform(plain, recipe, call)
    train_gates(model, train, steps, length)
    return measure(plain, model, held, tasks.windows_of(train, length, 2, seed=1), windows, length)


def main(
    model: Annotated[Path, typer.Option(help="Folder of a language model over bytes.")],
    steps: Annotated[int, typer.Option(help="Steps of 1024 bytes to train its gates.")] = 100,
    windows: Annotated[int, typer.Option(help="Held-out windows of 512 bytes to measure on.")] = 20,
    recent: Annotated[int, typer.Option(help="So many of the newest bytes are always held.")] = RECENT,
) -> None:
    """Train gates that evict, and show quality against memory."""
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)
    plain = AutoModelForCausalLM.from_pretrained(model).eval()
    train, held = tasks.stdlib_bytes()
    rows = on_bytes(plain, train, held, steps, windows, recent=recent)
    table = Table(title=f"{LENGTH} bytes, gates trained for {steps} steps, the newest {recent} always held")
    for column in ("tokens kept", "bits per byte", "of dense", "cache", "of dense", "a step"):
        table.add_column(column, justify="right")
    for i, row in enumerate(rows):
        table.add_row(
            f"{row.share:.0%}" if i else "dense",
            f"{row.bits:.4f}",
            f"{row.bits / rows[0].bits:.4f}",
            f"{row.size / 1024:,.0f} KiB",
            f"{row.size / rows[0].size:.2f}",
            f"{1e3 * row.seconds:.2f} ms",
        )
    console.print(table)
    bits = windowed(plain, LENGTH // 2, held, windows, LENGTH)
    console.print(f"the newest {LENGTH // 2} bytes in every head: {bits:.4f}, {bits / rows[0].bits:.4f} of dense")


if __name__ == "__main__":
    typer.run(main)
