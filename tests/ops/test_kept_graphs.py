"""What keys of graphs that are kept on disk say of gatecc's operators."""

from __future__ import annotations

import pytest
import torch
from torch._inductor.codecache import FxGraphHashDetails

from gatecc.ops import kept_graphs


def test_another_revision_is_another_key(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: set[str] = set()
    for revision in (1, 2):
        monkeypatch.setattr(kept_graphs, "REVISION", revision)
        with torch.compiler.config.patch(cache_key_tag="mine"):  # pyright: ignore[reportAttributeAccessIssue]  it is set when the module is made
            kept_graphs.tell()
            keys.add(FxGraphHashDetails(None, [], {}, []).cache_key_tag)
    assert len(keys) == 2
    assert all(key.startswith("mine ") for key in keys)


def test_they_are_told_with_the_operators() -> None:
    assert f"gatecc's operators {kept_graphs.REVISION}" in torch.compiler.config.cache_key_tag
