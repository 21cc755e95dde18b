"""A report on the terminal: tables, notes, and one line per claim."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import rich.table
from rich.console import Console
from rich.text import Text

from benchmarks.registry import Benchmark, Claim, Report, Table

# A pipe has no width of its own; tables should not wrap there.
PIPE_WIDTH = 130


def open_console(to_stderr: bool) -> Console:
    """Return the console that everything but JSON goes to."""
    stream = sys.stderr if to_stderr else sys.stdout
    return Console(file=stream, width=None if stream.isatty() else PIPE_WIDTH, highlight=False)


def rich_table(table: Table) -> rich.table.Table:
    """Return the table in rich's form; cells are text, never markup."""
    shown = rich.table.Table(title=Text(table.title), title_justify="left")
    for index, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="right" if index else "left")
    for row in table.rows:
        shown.add_row(*(Text(cell) for cell in row))
    return shown


def claim_line(claim: Claim) -> Text:
    """Return "PASS" or "FAIL", the claim and its numbers."""
    verdict = ("PASS", "green") if claim.passed else ("FAIL", "bold red")
    return Text.assemble(verdict, f"  {claim.text} ({claim.detail})")


def show(
    benchmark: Benchmark, report: Report, plots: Sequence[Path], seconds: float, console: Console
) -> None:
    """Print the whole report."""
    for table in report.tables:
        console.print()
        console.print(rich_table(table))
    console.print()
    for note in report.notes:
        console.print(Text(f"note: {note}"))
    for claim in report.claims:
        console.print(claim_line(claim))
    for path in plots:
        console.print(f"plot: {path}", markup=False, soft_wrap=True)
    failed = sum(not claim.passed for claim in report.claims)
    verdict = f"{failed} of {len(report.claims)} claims failed" if failed else "all claims hold"
    console.print(f"{benchmark.name}: {verdict}, {seconds:.0f} s", markup=False)
