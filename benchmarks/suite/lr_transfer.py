"""`lr_transfer`: is the best learning rate of a small model that of a large one?

Transformers on real text, wider and deeper, swept over learning rates: with one learning rate for
all leaves, and under the rules of ``us.transfer``, for which the model is not touched. What the
PyTorch packages for the same do is put beside it where they are installed.
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
from benchmarks.suite._transfer_sweep import Sweep, run_case

_BASE = TransformerConfig(data.VOCAB, 64, 2, 4, 2, 16, 192)
_WIDTH = Sweep(
    way="width",
    base=_BASE,
    factors=(1, 2, 4),
    rules=("standard", "mup"),
    steps=150,
    batch=8,
    seq=64,
    held_out=16,
    seeds=2,
    start=-13,
)
_DEPTH = replace(_WIDTH, way="depth", rules=("mup", "completep"))
QUICK = {"width": _WIDTH, "depth": _DEPTH}
FULL = {
    "width": replace(
        _WIDTH,
        factors=(1, 2, 4, 8, 16),
        rules=("standard", "mup", "spectral", "standard_lr"),
        steps=1000,
        batch=32,
        seq=128,
        seeds=2,
    ),
    "depth": replace(
        _DEPTH,
        factors=(1, 2, 4, 8),
        rules=("mup", "depth_mup", "completep"),
        steps=1000,
        batch=32,
        seq=128,
        seeds=2,
    ),
}


def sweeps(options: Options) -> Mapping[str, Sweep]:
    """Return the sweeps of the mode."""
    return FULL if options.full else QUICK


def cases(options: Options) -> Sequence[Case]:
    """Return one case per way, size and rule; rules are alike on the base."""
    return [
        Case(f"{way} × {factor}: {rule}", partial(run_case, sweep, factor, rule))
        for way, sweep in sweeps(options).items()
        for factor in sweep.factors
        for rule in (sweep.rules if factor > 1 else sweep.rules[:1])
    ]


def config(options: Options) -> Mapping[str, Any]:
    """Return sizes and schedules."""
    return {way: asdict(sweep) for way, sweep in sweeps(options).items()}


def report(results: dict[str, Result], options: Options) -> Report:
    """Return best learning rates, U-curves and what is claimed of them."""
    parts = {way: [r for r in results.values() if r.get("way") == way] for way in sweeps(options)}
    found = {way: each for way, each in parts.items() if each}
    return Report(
        tables=tuple(t for way, each in found.items() for t in _transfer_report.tables(way, each)),
        plots=tuple(p for way, each in found.items() for p in _transfer_report.plots(way, each)),
        claims=tuple(c for way, each in found.items() for c in _transfer_report.claims(way, each)),
    )


BENCHMARK = Benchmark(
    name="lr_transfer",
    summary="learning rates tuned on a small model, used on wider and deeper ones",
    cases=cases,
    report=report,
    needs_data=True,
    config=config,
)
