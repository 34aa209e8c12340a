"""Progress: a bar with the loss and tokens a second while a stage runs."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn


class Bar:
    """One bar a stage on stderr. ``shown=None``: only if stderr is a terminal."""

    def __init__(self, shown: bool | None) -> None:
        console = Console(stderr=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.4f}"),
            TextColumn("{task.fields[speed]:,.0f} tokens/s"),
            TimeRemainingColumn(),
        )
        self._bar = Progress(*columns, console=console, disable=not (console.is_terminal if shown is None else shown))
        self._task = TaskID(0)

    def stage(self, name: str, steps: int, done: int) -> None:
        """A new bar for a stage of which some steps are done."""
        self._task = self._bar.add_task(name, total=steps, completed=done, loss=float("nan"), speed=0.0)

    def step(self, done: int, loss: float, speed: float) -> None:
        """One more step."""
        self._bar.update(self._task, completed=done, loss=loss, speed=speed)

    def __enter__(self) -> Bar:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()
