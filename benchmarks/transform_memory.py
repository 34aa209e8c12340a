"""Peak memory of an in-place transform of a model of 1 GB, against the model and its new parameters.

    python benchmarks/transform_memory.py            # upcycle and gated-attention
    python benchmarks/transform_memory.py upcycle --layers 8

Each recipe in a process of its own. The peak is of the resident memory during the transform, what the interpreter and
its libraries hold left out; the bar is 1.3 times (model + new parameters). Linux alone tells the peak.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import gatecc

BAR = 1.3
OPTIONS: dict[str, dict[str, Any]] = {"upcycle": {"experts": 4}}


def status(key: str) -> float:
    """A figure of this process in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def llama(layers: int, width: int) -> torch.nn.Module:
    """A Llama of so many layers; 4 of width 2,048 have 1 GB in float32."""
    import transformers as hf

    config = hf.LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=max(width // 128, 1),
    )
    return hf.LlamaForCausalLM(config).eval()


def megabytes(model: torch.nn.Module) -> float:
    """Of its parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20


def measure(recipe: str, layers: int) -> bool:
    """One recipe in this process: print its row, and return whether it keeps the bar."""
    torch.set_num_threads(1)
    chosen = gatecc.recipe(recipe, **OPTIONS.get(recipe, {}))
    ids = torch.randint(0, 256, (2, 8))
    gatecc.transform(llama(1, 16), chosen, (ids,))  # what is imported and compiled on the way counts to the libraries
    model = llama(layers, 2048)
    before = megabytes(model)
    with torch.no_grad():
        model(ids)
    own = status("VmRSS") - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    gatecc.transform(model, chosen, (ids,), inplace=True)
    taken = {id(p): p for p in model.parameters()}
    aside = sum(p.numel() * p.element_size() for m in kept(model) for p in m.parameters() if id(p) not in taken) / 2**20
    whole = megabytes(model) + aside
    ratio = (status("VmHWM") - own) / whole
    print(f"{recipe:16} model {before:6.0f} MB, with what is new {whole:6.0f} MB, peak {ratio:.2f}x (at most {BAR}x)")
    return ratio <= BAR


def kept(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Modules of the model, and what a rewrite took out and keeps for revert."""
    from gatecc.ir.weights import modules_of

    return list(modules_of(model))


def main(
    recipe: Annotated[str, typer.Argument(help="one of gatecc.recipes(), or all of the table")] = "all",
    layers: Annotated[int, typer.Option(help="of the Llama, 268 MB each")] = 4,
) -> None:
    """Print a row for each recipe; exit code 1 if one breaks the bar."""
    if recipe != "all":
        raise typer.Exit(0 if measure(recipe, layers) else 1)
    codes = [
        subprocess.run([sys.executable, __file__, name, "--layers", str(layers)], check=False).returncode
        for name in ("upcycle", "gated-attention")
    ]
    raise typer.Exit(max(codes))


if __name__ == "__main__":
    typer.run(main)
