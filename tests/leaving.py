"""How a process of pytest-xdist ends: at once. It is imported before all else, for whoever registers first is called
last."""

from __future__ import annotations

import atexit
import os

_at_once: list[bool] = []


def at_once() -> None:
    """End this process without taking its objects apart, which keeps a processor busy for as long as a minute, and
    without waiting for what spins in a thread of some library. All has been reported by then."""
    _at_once.append(True)


@atexit.register
def _leave() -> None:
    if _at_once:
        os._exit(0)
