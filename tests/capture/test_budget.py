"""Work that runs away is stopped after its CPU time, and nothing of the watch stays behind."""

from __future__ import annotations

import threading
import time
from contextlib import suppress

import pytest

from gatecc.capture.budget import budget
from gatecc.capture.shield import apart


class StoppedError(Exception):
    """What these budgets raise."""


def spin(seconds: float) -> float:
    """Work in Python for some CPU time."""
    end = time.thread_time() + seconds
    while time.thread_time() < end:
        pass
    return time.thread_time()


def test_work_that_takes_too_long_is_stopped() -> None:
    before = threading.active_count()
    start = time.thread_time()
    with pytest.raises(StoppedError, match=r"0\.3"), budget(0.3, lambda s: StoppedError(f"{s}")):
        spin(30)
    assert time.thread_time() - start < 5
    assert threading.active_count() == before
    spin(0.5)  # nothing is raised later


def test_waiting_takes_no_cpu_time_and_results_pass() -> None:
    with budget(0.3, lambda s: StoppedError()):
        time.sleep(1)
        result = spin(0.01)
    assert result > 0
    with budget(None, lambda s: StoppedError()):
        spin(0.01)


def test_other_errors_pass() -> None:
    with pytest.raises(KeyError), budget(1, lambda s: StoppedError()):
        raise KeyError("mine")


def test_an_inner_budget_may_be_the_smaller_one_or_the_larger() -> None:
    for outer, inner, message in ((60, 0.3, "inner"), (0.3, 60, "outer")):
        with pytest.raises(StoppedError, match=message):
            nested(outer, inner)


def nested(outer: float, inner: float) -> None:
    with budget(outer, lambda s: StoppedError("outer")), budget(inner, lambda s: StoppedError("inner")):
        spin(30)


def test_work_behind_the_shield_is_stopped_too() -> None:
    """It runs in a thread of its own."""
    threads = threading.active_count()
    with pytest.raises(StoppedError):
        shielded_work()
    assert threading.active_count() == threads


def shielded_work() -> None:
    with budget(0.3, lambda s: StoppedError()):
        apart(lambda: spin(30))


def test_code_that_swallows_exceptions_does_not_escape() -> None:
    with pytest.raises(StoppedError):
        swallowing()


def swallowing() -> None:
    """What some libraries do."""
    with budget(0.3, lambda s: StoppedError()):
        for _ in range(2):
            with suppress(BaseException):
                spin(30)
