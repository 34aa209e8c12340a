"""The store: a failure at any moment leaves what was there before, whole."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from gatecc.errors import CheckpointError
from gatecc.ir import store


def write(folder: Path, value: float) -> None:
    store.write(folder, "head.json", {"value": value}, {"model": {"w": torch.full((3,), value)}, "example": {}})


def read(folder: Path) -> tuple[Any, list[float]]:
    data = store.read_head(folder, "head.json")
    assert store.read_tensors(folder, data, "example") == {}
    return data["value"], store.read_tensors(folder, data, "model")["w"].tolist()


def test_overwriting_leaves_no_old_files_and_keeps_foreign_ones(tmp_path: Path) -> None:
    (tmp_path / "README").write_text("mine")
    for value in (1.0, 2.0, 3.0):
        write(tmp_path, value)
        assert read(tmp_path) == (value, [value] * 3)
        assert len(list(tmp_path.iterdir())) == 4
    assert (tmp_path / "README").read_text() == "mine"


def test_writing_the_same_twice(tmp_path: Path) -> None:
    for _ in range(3):
        write(tmp_path, 1.0)
        assert read(tmp_path) == (1.0, [1.0] * 3)


def test_a_foreign_model_file_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_text("another's")
    write(tmp_path, 1.0)
    assert read(tmp_path) == (1.0, [1.0] * 3)
    assert (tmp_path / "model.safetensors").read_text() == "another's"


@pytest.mark.parametrize("moment", range(3))
@pytest.mark.parametrize("old", [False, True])
def test_a_failure_at_any_moment_leaves_the_old(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: int, old: bool
) -> None:
    folder = tmp_path / "a" / "b"
    if old:
        write(folder, 1.0)
    replace, calls = os.replace, iter(range(10))

    def failing(source: Any, target: Any) -> None:
        if next(calls) == moment:
            raise OSError("disk full")
        replace(source, target)

    before = sorted(folder.iterdir()) if old else []
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", failing)
        with pytest.raises(CheckpointError, match="disk full"):
            write(folder, 2.0)
    if not old:
        assert not folder.exists()
        return
    assert sorted(folder.iterdir()) == before
    assert read(folder) == (1.0, [1.0] * 3)


def test_a_file_where_the_folder_should_be(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        write(tmp_path / "x", 1.0)
    assert (tmp_path / "x").read_text() == ""
