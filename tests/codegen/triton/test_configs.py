"""Tables of kernels: both makes have the same entries, and a folder of one's own replaces some."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gatecc.codegen.triton.configs import VARIABLE, config
from gatecc.errors import ArgumentError

PACKAGES = ("gatecc.ops.linear_attention.triton", "gatecc.ops.moe_ffn.triton")


def keys(table: Any) -> Any:
    return {name: keys(entry) for name, entry in table.items()} if isinstance(table, dict) else None


@pytest.mark.parametrize("package", PACKAGES)
def test_both_makes_have_the_same_entries(package: str) -> None:
    folder = Path(*package.split("."), "configs")
    nvidia, amd = (json.loads((folder / f"{make}.json").read_text()) for make in ("nvidia", "amd"))
    assert keys(nvidia) == keys(amd)


def test_the_make_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for hip, warps in ((None, 8), ("7.0", 4)):
        monkeypatch.setattr(torch.version, "hip", hip)
        assert config(PACKAGES[1], "outer", "16 bits", "many")["warps"] == warps


def written(folder: Path, table: Any) -> None:
    (folder / "moe_ffn").mkdir()
    (folder / "moe_ffn" / "nvidia.json").write_text(json.dumps(table))


def test_entries_are_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = config(PACKAGES[1], "project", "16 bits", "few")
    written(tmp_path, {"project": {"16 bits": {"few": {"inner": 32}}}})
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    assert config(PACKAGES[1], "project", "16 bits", "few") == {**before, "inner": 32}
    assert config(PACKAGES[0], "mix", "16 bits")["warps"] == 8


@pytest.mark.parametrize(
    ("table", "found"),
    [
        ({"projects": {}}, "projects"),
        ({"project": {"16 bits": {"few": {"inner": "32"}}}}, "inner: '32'"),
        ({"project": 32}, "32"),
        ({"project": {"16 bits": {"few": {"depth": 3}}}}, "depth"),
    ],
)
def test_wrong_entries_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, table: dict[str, Any], found: str
) -> None:
    written(tmp_path, table)
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    with pytest.raises(ArgumentError) as error:
        config(PACKAGES[1], "project", "16 bits", "few")
    assert error.value.found == found
