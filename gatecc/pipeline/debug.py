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
    place = re.sub(r"[^\w.]", "_", program.fqn) or "model"
    if (path := folder(f"{place}-{name}.txt")) is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{line}\n\n{graph_text(program)}\n", encoding="utf-8")


def folder(name: str) -> Path | None:
    """The next numbered place in the folder that the user named, None if there is none."""
    wanted = os.environ.get(VARIABLE, "")
    return None if wanted in ("", "0", "1") else Path(wanted) / f"{next(_numbers):04d}-{name}"
