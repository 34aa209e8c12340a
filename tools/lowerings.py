"""The lowerings of the compile backend, for docs/compile.md: each says of itself what becomes what."""

from __future__ import annotations

import inspect

from gatecc.passes.lower import LOWERINGS


def lowering_rows() -> list[tuple[str, str, str]]:
    """Name and first paragraph of each: ``name: what becomes what``, at the head of its file; and what it leaves."""
    texts = {name: inspect.getdoc(inspect.getmodule(cls)) or "" for name, cls in sorted(LOWERINGS.items())}
    words = {name: " ".join(text.split("\n\n")[0].split()).partition(": ")[2] for name, text in texts.items()}
    return [(name, text, LOWERINGS[name].left) for name, text in words.items()]
