"""What the user should know once: that something runs, but not by the kernel that was written for it."""

from __future__ import annotations

import logging
from functools import lru_cache

LOG = logging.getLogger("gatecc")


@lru_cache
def say_once(what: str) -> None:
    """Log a warning, the first time."""
    LOG.warning(what)
