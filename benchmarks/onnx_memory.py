"""Peak memory of gatecc.export of a model of 1 GB, against the model.

    python benchmarks/onnx_memory.py [--layers 4]

A row each, in a process of its own: to the files alone (``verify=False``), compared in ONNX Runtime (which a process
beside this one does: its peak is the last column), and with the weights in a file of their own. Resident memory during
the export, less what the interpreter and its libraries hold. Linux alone tells the peak.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Annotated, Any

import psutil
import torch
import typer
from transform_memory import llama, megabytes, status

import gatecc

CASES: dict[str, tuple[dict[str, Any], float]] = {
    "written": ({"verify": False}, 1.3),
    "compared": ({}, 1.5),
    "compared, weights beside": ({"external_data": True}, 1.5),
}


class Beside(threading.Thread):
    """The peak of the processes that this one starts, in MB."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak, self.done = 0.0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            for child in psutil.Process().children():
                try:
                    self.peak = max(self.peak, child.memory_info().rss / 2**20)
                except psutil.NoSuchProcess:
                    continue


def measure(case: str, layers: int) -> bool:
    """One case in this process: print its row, and return whether it keeps the bar."""
    torch.set_num_threads(1)
    options, bar = CASES[case]
    inputs = {"input_ids": torch.randint(0, 256, (2, 8))}
    with tempfile.TemporaryDirectory() as folder:
        gatecc.export(llama(1, 128), Path(folder) / "small", inputs, **options)  # what it imports counts to libraries
        model = llama(layers, 2048)
        size = megabytes(model)
        with torch.no_grad():
            model(**inputs)
        own = status("VmRSS") - size
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        beside = Beside()
        beside.start()
        gatecc.export(model, Path(folder) / "out", inputs, **options)
        beside.done.set()
        ratio = (status("VmHWM") - own) / size
    print(f"{case:26} model {size:6.0f} MB, peak {ratio:.2f}x (at most {bar}x), beside {beside.peak / size:.2f}x")
    return ratio <= bar


def main(
    case: Annotated[str, typer.Argument(help="written, compared, ..., or all of them")] = "all",
    layers: Annotated[int, typer.Option(help="of the Llama, 268 MB each")] = 4,
) -> None:
    """Print a row for each case; exit code 1 if one breaks its bar."""
    if case != "all":
        raise typer.Exit(0 if measure(case, layers) else 1)
    codes = [
        subprocess.run([sys.executable, __file__, name, "--layers", str(layers)], check=False).returncode
        for name in CASES
    ]
    raise typer.Exit(max(codes))


if __name__ == "__main__":
    typer.run(main)
