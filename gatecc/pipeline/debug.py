"""``GATECC_DEBUG``: every step of the pipeline, seen from outside.

``GATECC_DEBUG=1`` prints one line per step to standard error: the module, the step, the size of its graph, the time.
Any other value is a folder, which gets the graph after each step as a text file besides, numbered in order.
"""

from __future__ import annotations

import itertools
import os
import re
import sys
from pathlib import Path

from gatecc.ir.printer import graph_text
from gatecc.ir.program import Program

VARIABLE = "GATECC_DEBUG"
_numbers = itertools.count(1)


def show(line: str, name: str, program: Program) -> None:
    """Show one step, if the user asked for it."""
    wanted = os.environ.get(VARIABLE, "")
    if wanted in ("", "0"):
        return
    print(f"gatecc: {line}", file=sys.stderr)
    if wanted != "1":
        folder = Path(wanted)
        folder.mkdir(parents=True, exist_ok=True)
        place = re.sub(r"[^\w.]", "_", program.fqn) or "model"
        text = f"{line}\n\n{graph_text(program)}\n"
        (folder / f"{next(_numbers):04d}-{place}-{name}.txt").write_text(text, encoding="utf-8")
