"""What was compiled is known again, and what is another kernel is not taken for it; jobs are done elsewhere as here."""

from __future__ import annotations

import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gatecc.codegen.judge import jobs, kept
from gatecc.codegen.judge.compiled import Launch, Resources, recorded
from tests.codegen.judge import kernels

TAKEN = Resources(registers=64, spills=0, shared=1024, threads=128, dots=1, matrix=4, double=0, vector=16)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """The targets that something was compiled for, in an empty cache; nothing is compiled."""
    found: list[str] = []

    def compile_launch(made: Launch, target: str) -> Resources:
        found.append(target)
        return TAKEN._replace(registers=made.given["N"])

    monkeypatch.setenv("GATECC_CACHE", str(tmp_path))
    monkeypatch.setattr(kept, "compile_launch", compile_launch)
    return found


def launched(scale: float = 0.5, rows: int = 32, **options: Any) -> Launch:
    """A launch of a product. ``rows`` is of no kernel: it tells what numbers a launch tells apart."""
    launcher: Any = kernels
    x = torch.empty(32, 32, dtype=torch.bfloat16, device="meta")
    with recorded("sm_90", kernels) as found:
        launcher.product[(1,)](x, x, torch.empty(32, 32, device="meta"), scale, **{"WIDE": False, "N": 32} | options)
    return found[0]._replace(given={**found[0].given, "rows": rows})


def test_a_launch_is_compiled_once(compiled: list[str]) -> None:
    assert [kept.resources(launched(), "sm_90").registers for _ in range(2)] == [32, 32]
    assert compiled == ["sm_90"]
    assert kept.resources(launched(), "gfx942").registers == 32
    assert kept.resources(launched(N=64), "sm_90").registers == 64
    assert kept.resources(launched(num_warps=8), "sm_90").registers == 32
    assert compiled == ["sm_90", "gfx942", "sm_90", "sm_90"]


def test_what_is_kept_and_no_resources_is_compiled_anew(compiled: list[str], tmp_path: Path) -> None:
    kept.resources(launched(), "sm_90")
    (file,) = (tmp_path / "judge").iterdir()
    for text in ("", "[]", '{"registers": 1}'):
        file.write_text(text)
        assert kept.resources(launched(), "sm_90").registers == 32
    assert len(compiled) == 4


def test_launches_are_told_apart_by_what_a_compiler_sees() -> None:
    """A constant by its value; a number by whether it is 1, or a multiple of 16."""
    usual = launched().specialised
    assert launched(N=64).specialised != usual
    assert launched(WIDE=True).specialised != usual
    assert launched(num_stages=3).specialised != usual
    assert launched(0.25).specialised == usual
    assert [launched(rows=rows).specialised == usual for rows in (48, 33, 1)] == [True, False, False]


def test_others_do_the_jobs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads stand in for processes, which would import torch; what is handed over is handed over as to a process."""

    class Threads(ThreadPoolExecutor):
        def __init__(self, workers: int, context: Any, initializer: Any) -> None:
            assert (workers, context.get_start_method()) == (2, "spawn")
            super().__init__(1, initializer=pickle.loads(pickle.dumps(initializer)))

        def map(self, function: Any, *given: Any, **_: Any) -> Any:
            sent = pickle.loads(pickle.dumps((function, given)))
            return map(pickle.loads, map(pickle.dumps, super().map(sent[0], *sent[1])))

    monkeypatch.setattr(jobs, "ProcessPoolExecutor", Threads)
    wanted = [jobs.Job(family=("tests.codegen.judge.toys", 0), dtype=dtype, case="odd") for dtype in ("fp32", "bf16")]
    found = list(jobs.run(wanted, 2))
    assert found == [jobs.judged(job) for job in wanted]
    assert [f.dtype for (f,) in found] == ["fp32", "bf16"]
