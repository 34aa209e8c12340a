"""Frames: where in the Python code a node was made, without what makes torch's own stack traces dear.

torch records a trace for each node through its profiler and reads the source line of each frame: an eighth of the time
of a capture. gatecc wants files and line numbers alone.
"""

from __future__ import annotations

import sys
from collections.abc import Generator
from contextlib import contextmanager
from traceback import FrameSummary, StackSummary
from typing import Any

from torch.fx import proxy
from torch.utils._traceback import CapturedTraceback


class Frames:
    """What torch.fx asks of a CapturedTraceback."""

    def __init__(self, frames: list[FrameSummary]) -> None:
        self._frames = frames

    @classmethod
    def extract(cls, **_: Any) -> Frames:
        """The frames of the caller that run a forward, the outermost first; torch drops the others too."""
        found: list[FrameSummary] = []
        frame = sys._getframe(1)
        while frame is not None:
            code = frame.f_code
            if code.co_name == "forward":
                found.append(FrameSummary(code.co_filename, frame.f_lineno, "forward", lookup_line=False, line=""))
            frame = frame.f_back
        return cls(found[::-1])

    def summary(self) -> StackSummary:
        """Frames without their source lines."""
        return StackSummary.from_list(self._frames)


@contextmanager
def no_source_lines() -> Generator[None]:
    """Nodes that are made meanwhile get stack traces without source lines."""
    proxy.__dict__["CapturedTraceback"] = Frames
    try:
        yield
    finally:
        proxy.__dict__["CapturedTraceback"] = CapturedTraceback  # whatever was there before: captures may overlap
