"""SIGTERM as a command takes it: what it holds is put away first, as with Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Generator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def ended_cleanly() -> Generator[None]:
    """While this lasts SIGTERM raises SystemExit with 128 + 15, so that temporary folders are removed and processes
    beside this one end. Another SIGTERM meanwhile changes nothing; a handler that somebody has set stays."""
    mine = threading.current_thread() is threading.main_thread()
    if not mine or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _end(number: int, _: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)
    raise SystemExit(128 + number)
