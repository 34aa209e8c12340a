"""``python -m tests.compatibility [WORD ...]``: run the cells whose names have all words.

Without words, all of them, and write docs/compatibility.md.
"""

from __future__ import annotations

import logging
import os
import sys
import time
import warnings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from tests.compatibility.cells import Cell, Outcome, every_cell, run
from tests.compatibility.page import write


def main() -> int:
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    words = sys.argv[1:]
    found: dict[Cell, Outcome] = {}
    for cell in every_cell():
        if all(word in str(cell) for word in words):
            start = time.process_time()
            found[cell] = run(cell)
            print(f"{cell}: {found[cell].kind} {found[cell].text} ({time.process_time() - start:.1f} s)", flush=True)
            torch._dynamo.reset()
    failed = sum(outcome.kind == "fails" for outcome in found.values())
    print(f"{len(found)} cells, {failed} fail")
    if not words:
        write(found)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
