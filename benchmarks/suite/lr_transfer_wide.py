"""`lr_transfer_wide`: learning rates over 16 times the width, from 32 to 512.

The width sweep of ``lr_transfer`` from a smaller base to a wider target, one seed: long on CPU.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Benchmark, Case, Options, Report, Result
from benchmarks.suite import _transfer_report
from benchmarks.suite._transfer_sweep import run_case
from benchmarks.suite.lr_transfer import QUICK

SWEEP = replace(
    QUICK["width"],
    base=TransformerConfig(data.VOCAB, 32, 2, 2, 1, 16, 96),
    factors=(1, 4, 16),
    seeds=1,
)


def cases(options: Options) -> Sequence[Case]:
    """Return one case per width and rule; rules are alike on the base."""
    del options
    return [
        Case(f"width × {factor}: {rule}", partial(run_case, SWEEP, factor, rule))
        for factor in SWEEP.factors
        for rule in (reversed(SWEEP.rules) if factor > 1 else SWEEP.rules[:1])
    ]


def config(options: Options) -> Mapping[str, Any]:
    """Return sizes and schedules."""
    del options
    return asdict(SWEEP)


def report(results: dict[str, Result], options: Options) -> Report:
    """Return best learning rates, U-curves and what is claimed of them."""
    del options
    each = [*results.values()]
    return Report(
        tables=tuple(_transfer_report.tables("width", each)),
        plots=tuple(_transfer_report.plots("width", each)),
        claims=tuple(_transfer_report.claims("width", each)),
    )


BENCHMARK = Benchmark(
    name="lr_transfer_wide",
    summary="learning rates over 16 times the width (long on CPU)",
    cases=cases,
    report=report,
    needs_data=True,
    config=config,
)
