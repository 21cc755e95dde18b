"""Progress of a running case: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar

SECONDS_BETWEEN_LINES = 10.0


class PlainProgress:
    """Lines for logs and pipes, at most one per few seconds."""

    def __init__(self, console: Console, label: str) -> None:
        """Print to ``console``, naming the work ``label``."""
        self.console = console
        self.label = label

    def __enter__(self) -> Self:
        """Begin; the first line comes with ``start``."""
        return self

    def __exit__(self, *error: object) -> None:
        """End; nothing to clean up."""

    def start(self, total: int, what: str) -> None:
        """Begin a piece of work of ``total`` units."""
        self.total, self.what, self.done = total, what, 0
        self.printed = time.monotonic()
        self.console.print(f"{self.label}: {total} {what}", markup=False)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Count, and print a line if the last one is a while ago."""
        self.done += units
        if time.monotonic() - self.printed >= SECONDS_BETWEEN_LINES or self.done >= self.total:
            self.printed = time.monotonic()
            line = f"{self.label}: {self.done}/{self.total} {self.what} {note}"
            self.console.print(line.rstrip(), markup=False)


class BarProgress:
    """A live bar with the remaining time."""

    def __init__(self, console: Console, label: str) -> None:
        """Draw on ``console``, naming the work ``label``."""
        self.bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
        )
        self.task = self.bar.add_task(label, total=None, note="")

    def __enter__(self) -> Self:
        """Show the bar."""
        self.bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Leave the bar as it stands."""
        self.bar.stop()

    def start(self, total: int, what: str) -> None:
        """Begin a piece of work of ``total`` units."""
        self.bar.update(self.task, total=total, completed=0, note=what)

    def advance(self, units: int = 1, note: str = "") -> None:
        """Move the bar."""
        self.bar.update(self.task, advance=units, note=note)


def open_progress(console: Console, label: str) -> BarProgress | PlainProgress:
    """Return the progress display that suits the console, as a context manager."""
    kind = BarProgress if console.is_terminal else PlainProgress
    return kind(console, label)
