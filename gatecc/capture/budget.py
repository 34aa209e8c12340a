"""Budget: an amount of CPU time for a piece of work that may run away, such as torch's reasoning about sizes.

The work is pure Python for most of its time, so an exception can be raised in its thread from another one. Nothing
stays behind: the watching thread ends with the block. Work that the block waits for in another thread (see shield.py)
counts too, so the clock is that of the process; or that on the wall, where several cores make it the slower one.
"""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager

_OFTEN = 0.2  # seconds between two looks at the clock, at most
_AGAIN = 1.0  # seconds until the exception is raised again, if somebody has swallowed it


class OutOfTime(BaseException):
    """Raised in the block. No Exception, lest code that tries one way and then another takes it for a failed try."""


@contextmanager
def budget(seconds: float | None, spent: Callable[[float], Exception]) -> Generator[None]:
    """Raise ``spent(seconds)`` if the block takes more CPU time than that; None is no limit."""
    if seconds is None:
        yield
        return
    mine = type("OutOfTime", (OutOfTime,), {})  # budgets nest: each knows its own
    done = threading.Event()
    over = threading.Event()
    watch = threading.Thread(target=_watch, args=(threading.get_ident(), seconds, mine, done, over), daemon=True)
    try:
        watch.start()
        yield
    except mine:
        pass
    finally:
        _stop(watch, done, mine)
    if over.is_set():  # even if the work has swallowed the exception, and went on
        raise spent(seconds)


def _watch(thread: int, seconds: float, error: type[OutOfTime], done: threading.Event, over: threading.Event) -> None:
    work, clock = time.process_time(), time.monotonic()
    while not done.wait(min(_OFTEN, seconds)):
        if min(time.process_time() - work, time.monotonic() - clock) >= seconds:
            over.set()
            _raise(thread, error)
            done.wait(_AGAIN)


def _stop(watch: threading.Thread, done: threading.Event, mine: type[OutOfTime]) -> None:
    """End the watch; what it raises at this very moment comes to nothing."""
    while True:
        try:
            done.set()
            watch.join()
            _raise(threading.get_ident(), None)
            return
        except mine:
            continue


def _raise(thread: int, error: type[OutOfTime] | None) -> None:
    exception = None if error is None else ctypes.py_object(error)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread), exception)
