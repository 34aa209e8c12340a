"""Stage: one step of the pipeline, as its observers are told of it once it is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from gatecc.ir.program import Program
from gatecc.ir.rewrite import Rewrite
from gatecc.pipeline import debug

Name = Literal["canonicalize", "match", "rewrite", "clean", "lower"]


@dataclass(frozen=True, eq=False)
class Stage:
    """What was done to a program. Observers read the program as it is now and leave it alone."""

    name: Name
    program: Program
    nodes: int  # in the graph before the step
    seconds: float  # of CPU time
    rewrite: Rewrite | None = None  # of a step "rewrite"
    lowering: str = ""  # of a step "lower"

    @property
    def now(self) -> int:
        """The number of nodes in the graph now."""
        return len(self.program.graph.nodes)

    def __str__(self) -> str:
        what = f"{self.name} {self.rewrite or self.lowering}".rstrip()
        size = f"{self.nodes} -> {self.now} nodes"
        return f"{self.program.fqn or type(self.program.module).__name__}: {what}: {size}, {self.seconds * 1e3:.1f} ms"


Observer = Callable[[Stage], None]


@contextmanager
def step(
    name: Name, program: Program, observer: Observer | None, rewrite: Rewrite | None = None, *, lowering: str = ""
) -> Generator[None]:
    """Do one step inside; afterwards the observer is told, and the one of ``GATECC_DEBUG``."""
    nodes, clock = len(program.graph.nodes), time.process_time()
    yield
    stage = Stage(name, program, nodes, time.process_time() - clock, rewrite, lowering)
    if observer is not None:
        observer(stage)
    debug.show(str(stage), name, program)


@dataclass
class Times:
    """An observer that adds up the seconds of each kind of step; ``add`` takes those of work around the pipeline."""

    seconds: dict[str, float] = field(default_factory=dict[str, float])
    then: Observer | None = None

    def __call__(self, stage: Stage) -> None:
        self.add(stage.name, stage.seconds)
        if self.then is not None:
            self.then(stage)

    def add(self, name: str, seconds: float) -> None:
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
