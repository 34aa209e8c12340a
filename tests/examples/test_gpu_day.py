"""benchmarks/gpu.py on the CPU: a kernel that is wrong stops it, a contender that fails does not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import gpu
from gatecc.codegen.judge.numbers import Numbers


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """The judge has tests of its own."""
    monkeypatch.setattr(gpu, "correctness", lambda place: [Numbers("toy", "odd", "fp32", (), {}, ())])


@pytest.mark.usefixtures("quick")
def test_a_rehearsal(tmp_path: Path) -> None:
    gpu.main(["--rehearse", "--only", "experts", "--json", str(tmp_path / "gpu.json")])
    data = json.loads((tmp_path / "gpu.json").read_text())
    assert "rehearsal" in data["device"]
    assert [race["what"].rpartition(", ")[2] for race in data["races"]] == ["forward", "forward and backward"]
    assert all({"ours", "eager", "grouped_mm"} <= set(race["milliseconds"]) for race in data["races"])


def test_a_contender_that_fails_is_absent() -> None:
    def fails() -> None:
        raise RuntimeError("out of memory")

    place = gpu.Place(gpu.torch.device("cpu"), gpu.torch.float32, small=True)
    result = gpu.timed(gpu.Race("a race", {"ours": lambda: 1, "theirs": fails, "others": "not installed"}), place)
    assert set(result.milliseconds) == {"ours"}
    assert result.absent == {"theirs": "RuntimeError: out of memory", "others": "not installed"}


def test_a_wrong_kernel_stops_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[Any] = [Numbers("toy", "odd", "fp32", (), {}, ("y errs by 1",))]
    monkeypatch.setattr(gpu, "correctness", lambda place: wrong)
    monkeypatch.setattr(gpu, "SECTIONS", ())
    with pytest.raises(SystemExit) as stopped:
        gpu.main(["--rehearse", "--json", str(tmp_path / "gpu.json")])
    assert stopped.value.code == 1
    assert json.loads((tmp_path / "gpu.json").read_text())["checks"][0]["faults"] == ["y errs by 1"]
