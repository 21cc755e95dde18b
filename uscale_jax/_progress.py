"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeAlias

Advance: TypeAlias = Callable[[int, str], None]
"""``advance(bytes, note)`` counts finished bytes and says what comes next."""

_SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(label: str, total: int, shown: bool | None) -> Iterator[Advance]:
    """Yields what counts finished bytes, and shows them on stderr.

    Args:
      label: what is going on.
      total: how many bytes there are to do.
      shown: whether to show it; None where stderr is a terminal.
    """
    terminal = sys.stderr.isatty()
    if shown is False or (shown is None and not terminal):
        yield lambda size, note: None
        return
    bar = _rich_bar() if terminal else None
    if bar is None:
        yield _lines(label, total)
        return
    with bar:
        task = bar.add_task(label, total=total, note="")
        yield lambda size, note: bar.update(task, advance=size, note=note)


def _rich_bar() -> Any:
    """A bar of rich, which is no requirement; None without it."""
    try:
        from rich import progress as rich
        from rich.console import Console
    except ImportError:
        return None
    return rich.Progress(
        rich.TextColumn("{task.description}"),
        rich.BarColumn(),
        rich.DownloadColumn(binary_units=True),
        rich.TransferSpeedColumn(),
        rich.TimeRemainingColumn(),
        rich.TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


def _lines(label: str, total: int) -> Advance:
    """Lines for logs and pipes: the first, the last, and one every few seconds."""
    done, printed = 0, -_SECONDS_BETWEEN_LINES

    def advance(size: int, note: str) -> None:
        nonlocal done, printed
        done += size
        if done >= total or time.monotonic() - printed >= _SECONDS_BETWEEN_LINES:
            printed = time.monotonic()
            line = f"{label}: {_mebibytes(done)} of {_mebibytes(total)} MiB {note}"
            print(line.rstrip(), file=sys.stderr)

    return advance


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f}"
