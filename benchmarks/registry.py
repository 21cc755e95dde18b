"""What a benchmark is, and how the ones in ``benchmarks.suite`` are found."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from benchmarks import suite

Result = dict[str, Any]
Scale = Literal["linear", "log", "log-y", "symlog"]


class UsageError(Exception):
    """A mistake of the caller; its text is shown as one line and the exit code is 2."""


@dataclass(frozen=True)
class Options:
    """What the command line asked for. ``data`` is None for the default corpus."""

    full: bool
    seed: int
    out: Path
    data: Path | None = None

    @property
    def mode(self) -> str:
        """Return "full" or "quick"."""
        return "full" if self.full else "quick"


class Progress(Protocol):
    """Where a running case says how far it is."""

    def start(self, total: int, what: str) -> None:
        """Begin a piece of work of ``total`` units."""

    def advance(self, units: int = 1, note: str = "") -> None:
        """Report ``units`` more as done, with a short note on the state."""


@dataclass(frozen=True)
class Case:
    """One resumable piece of a benchmark; ``run`` returns a result that JSON can hold."""

    name: str
    run: Callable[[Options, Progress], Result]


@dataclass(frozen=True)
class Table:
    """A table of text cells, the first column left-aligned, the others right-aligned."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Series:
    """One labelled curve or set of bars. None in ``y`` is a missing or non-finite value.

    ``color`` and ``dash`` index the palette and the line styles; ``wide`` draws a broad pale
    line that stays visible below another one.
    """

    label: str
    x: tuple[float | str, ...]
    y: tuple[float | None, ...]
    color: int = 0
    dash: int = 0
    wide: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes.

    ``marks`` are labelled lines at a value of x, ``levels`` at a value of y. Bars lie on their
    side, so that long names have room: their values run along the horizontal axis.
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    kind: Literal["line", "bar"] = "line"
    scale: Scale = "linear"
    marks: tuple[tuple[float, str], ...] = ()
    levels: tuple[tuple[float, str], ...] = ()


@dataclass(frozen=True)
class Plot:
    """One PNG of panels side by side with a common legend; ``name`` is the file's stem."""

    name: str
    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Claim:
    """A statement the benchmark makes, whether it held, and the numbers behind it."""

    text: str
    passed: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All a benchmark has to show; terminal, JSON and PNG are made from this alone."""

    tables: tuple[Table, ...] = ()
    plots: tuple[Plot, ...] = ()
    claims: tuple[Claim, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Return whether every claim held."""
        return all(claim.passed for claim in self.claims)


@dataclass(frozen=True)
class Benchmark:
    """A named set of cases and the function that turns their results into a report.

    ``config`` returns the settings behind the numbers, for the record. ``module`` is the name of
    the module that defines the benchmark, filled in when it is discovered.
    """

    name: str
    summary: str
    cases: Callable[[Options], Sequence[Case]]
    report: Callable[[dict[str, Result], Options], Report]
    needs_data: bool = False
    config: Callable[[Options], Mapping[str, Any]] = lambda options: {}
    module: str = ""


def discover() -> dict[str, Benchmark]:
    """Return the benchmarks of ``benchmarks.suite`` by name, the tour first.

    Modules whose name starts with an underscore are helpers, not benchmarks.
    """
    found: dict[str, Benchmark] = {}
    for module_info in pkgutil.iter_modules(suite.__path__):
        if module_info.name.startswith("_"):
            continue
        module = f"{suite.__name__}.{module_info.name}"
        benchmark = replace(importlib.import_module(module).BENCHMARK, module=module)
        if benchmark.name in found:
            raise ValueError(f"two benchmarks are named {benchmark.name!r}")
        found[benchmark.name] = benchmark
    return dict(sorted(found.items(), key=lambda item: (item[0] != "tour", item[0])))


def select(names: Sequence[str]) -> list[Benchmark]:
    """Return the benchmarks of the given names, each once, in the given order."""
    known = discover()
    for name in names:
        if name not in known:
            raise UsageError(f"unknown benchmark {name!r}; known: {', '.join(known)}")
    return [known[name] for name in dict.fromkeys(names)]
