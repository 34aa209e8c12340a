"""Write the computed parts of golden cases anew: ``python -m tests.golden [FOLDER/CASE ...]``."""

from __future__ import annotations

import sys

from tests.golden.case import FOLDER, cases, rerun

for path in [FOLDER / f"{name.removesuffix('.txt')}.txt" for name in sys.argv[1:]] or cases():
    before, after = rerun(path)
    path.write_text(after)
    print(f"{path.relative_to(FOLDER)}: {'unchanged' if before == after else 'written'}")
