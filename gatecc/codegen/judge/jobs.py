"""Jobs: the parts of a check, each done by itself, here or in processes of their own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass

import torch

from gatecc.codegen.judge.binaries import Binary, judge_launch, launches
from gatecc.codegen.judge.family import families_of
from gatecc.codegen.judge.numbers import Numbers, judge_numbers

Finding = Numbers | Binary
Place = tuple[str, int]  # of a family: its module, and which of those that this has


@dataclass(frozen=True, kw_only=True)
class Job:
    """A case of a family in a dtype; or the launches of a size, compiled for a target. ``only``: of these kernels."""

    family: Place
    dtype: str
    case: str = ""
    size: str = ""
    target: str = ""
    only: tuple[str, ...] = ()


def judged(job: Job) -> list[Finding]:
    """Do a job."""
    module, at = job.family
    family = families_of(module)[at]
    if job.case:
        return [judge_numbers(family, job.case, job.dtype)]
    made = launches(family, job.size, job.dtype, job.target)
    made = [launch for launch in made if not job.only or launch.name in job.only]
    return [judge_launch(family, launch, job.size, job.dtype, job.target) for launch in made]


def run(jobs: Sequence[Job], processes: int) -> Iterator[list[Finding]]:
    """Do jobs, and yield what they find in their order. In one process that is this one."""
    if processes <= 1:
        yield from map(judged, jobs)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process with threads may stop for good
    with ProcessPoolExecutor(processes, context, initializer=_begin) as pool:
        try:
            yield from pool.map(judged, jobs)
        finally:
            pool.shutdown(cancel_futures=True)


def _begin() -> None:
    """One thread for each process."""
    torch.set_num_threads(1)
