"""Running a benchmark: finished cases are loaded, the others run and saved one by one."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks import environment
from benchmarks.data import corpus_sha256
from benchmarks.plots import draw
from benchmarks.progress import open_progress
from benchmarks.registry import Benchmark, Options, Report, Result
from benchmarks.render import show
from benchmarks.store import CaseStore, to_json, write_atomic


def run_cases(
    benchmark: Benchmark, options: Options, store: CaseStore, console: Console, fresh: bool = False
) -> dict[str, Result]:
    """Return the result of every case, running only those that ``store`` does not hold."""
    results = {}
    for case in benchmark.cases(options):
        label = f"{benchmark.name}/{case.name}"
        saved = None if fresh else store.load(case.name)
        if saved is not None:
            console.print(f"{label}: loaded from {store.folder}", markup=False, soft_wrap=True)
            results[case.name] = saved
            continue
        with open_progress(console, label) as progress:
            results[case.name] = store.save(case.name, case.run(options, progress))
    return results


def run_benchmark(
    benchmark: Benchmark,
    options: Options,
    console: Console,
    command_line: list[str],
    fresh: bool = False,
) -> dict[str, Any]:
    """Run, show and save one benchmark; return the record that is also in its ``report.json``."""
    start = time.perf_counter()
    folder = options.out / benchmark.name
    sha256 = corpus_sha256(options.data) if benchmark.needs_data else None
    fingerprint = environment.fingerprint(benchmark, options, sha256)
    store = CaseStore(folder / "cases", fingerprint)
    results = run_cases(benchmark, options, store, console, fresh)
    report = benchmark.report(results, options)
    plots = _draw_all(report, folder)
    seconds = time.perf_counter() - start
    show(benchmark, report, plots, seconds, console)
    record = {
        "benchmark": benchmark.name,
        "passed": report.passed,
        "environment": environment.describe(options, command_line),
        "fingerprint": fingerprint,
        "config": benchmark.config(options),
        "seconds": seconds,
        "results": results,
        "tables": [asdict(table) for table in report.tables],
        "claims": [asdict(claim) for claim in report.claims],
        "notes": report.notes,
        "plots": [str(path) for path in plots],
    }
    write_atomic(folder / "report.json", to_json(record).encode())
    return record


def _draw_all(report: Report, folder: Path) -> list[Path]:
    paths = []
    for plot in report.plots:
        path = folder / f"{plot.name}.png"
        write_atomic(path, draw(plot))
        paths.append(path)
    return paths
