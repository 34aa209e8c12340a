from __future__ import annotations

import os
from pathlib import Path

import pytest

from gatecc.ir.files import write_atomic


def test_writes_text_and_bytes_and_makes_folders(tmp_path: Path) -> None:
    assert write_atomic(tmp_path / "a" / "b.txt", "σ").read_bytes() == "σ".encode()
    assert write_atomic(tmp_path / "a" / "b.txt", b"\x00").read_bytes() == b"\x00"
    assert os.listdir(tmp_path / "a") == ["b.txt"]


def test_keeps_the_mode_of_what_it_replaces(tmp_path: Path) -> None:
    place = tmp_path / "f"
    write_atomic(place, "x")
    plain = tmp_path / "plain"
    plain.write_text("x")
    assert place.stat().st_mode == plain.stat().st_mode
    place.chmod(0o640)
    write_atomic(place, "y")
    assert place.stat().st_mode & 0o777 == 0o640


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = write_atomic(tmp_path / "f", "old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk"):
        write_atomic(place, "new")
    assert place.read_text() == "old"
    assert os.listdir(tmp_path) == ["f"]
