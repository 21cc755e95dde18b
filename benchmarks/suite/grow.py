"""`grow`: is growing a trained model worth it, against training the large one from scratch?

Small language models are trained on real text, grown in width, depth or both, and trained on;
held-out loss against FLOPs says what that saves. What the literature disputes are further rows.

The settings were chosen on seed 0 of the corpus; seeds 1 to 3 are reported. Two choices were not
blind to them. The LSTM grew by noise at first; that failed on seeds 1 to 3 as well, and only then
was zero fan-out tried, on seed 0. That the claims ask for every seed, not for the mean, was decided
after the first report; it fails one claim more. The number of steps decides what growth seems to
save: on seed 0 ("both") 800 steps gave more than 1000, 1500 less. 1000 fit the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.lstm import LSTMConfig
from benchmarks.registry import Benchmark, Case, Options, Report, Result
from benchmarks.suite import _grow_report
from benchmarks.suite._grow_contest import (
    CONTROL,
    COPIES,
    EXTRA,
    FRESH_UNITS,
    LSTM_EXTRA,
    Size,
    Target,
    run_case,
)

SEEDS = 3
TUNED_ON = 0
"""The settings were chosen on this seed, which is therefore not reported."""


def _transformer(hidden: int, layers: int, heads: int, mlp: int, head_dim: int = 8) -> Any:
    return TransformerConfig(data.VOCAB, hidden, layers, heads, heads // 2, head_dim, mlp)


# Measured on seed 0. Learning rates from scratch: "both" the best of 0.002, 0.004 and 0.008,
# "width" of 0.004, 0.006 and 0.008, "depth" of 0.004, 0.008 and 0.016, the LSTM of 0.004, 0.008,
# 0.016 and 0.032; of the small models: of 0.004 (Transformer), 0.008, 0.016 and 0.032 (LSTM). Runs
# of 1000 steps ("depth", LSTMs), 1500 ("both", "width") and 3000 (the small Transformer).
# A quarter of the FLOPs for the small model saved more than two fifths, noise of 1 more than 2;
# for the LSTM, zero fan-out more than noise.
QUICK = {
    "transformer": Size(
        small=_transformer(24, 2, 4, 64),
        targets={
            "both": Target(_transformer(48, 4, 8, 128), 4e-3, 0.25, extra=EXTRA),
            "width": Target(_transformer(48, 2, 8, 128), 4e-3, 0.25, extra=(CONTROL,)),
            "depth": Target(_transformer(24, 4, 4, 64), 8e-3, 0.25, extra=(COPIES,)),
        },
        rate=8e-3,
        steps=1000,
        chunk=50,
        batch=8,
        seq=64,
        held_out=24,
        warm_up=50,
        control_steps=200,
    ),
    "lstm": Size(
        small=LSTMConfig(data.VOCAB, 24, 32, 1),
        targets={
            "width": Target(
                LSTMConfig(data.VOCAB, 48, 64, 1), 1.6e-2, 0.25, FRESH_UNITS, LSTM_EXTRA
            )
        },
        rate=1.6e-2,
        steps=1000,
        chunk=50,
        batch=8,
        seq=64,
        held_out=24,
        warm_up=50,
        control_steps=200,
    ),
}
# Larger and not tuned: no run of these sizes stands behind the learning rates.
FULL = {
    "transformer": Size(
        small=_transformer(256, 4, 8, 704, 32),
        targets={
            "both": Target(_transformer(512, 8, 16, 1408, 32), 1e-3, 0.25, extra=EXTRA),
            "width": Target(_transformer(512, 4, 16, 1408, 32), 1e-3, 0.25, extra=(CONTROL,)),
            "depth": Target(_transformer(256, 8, 8, 704, 32), 2e-3, 0.25, extra=(COPIES,)),
        },
        rate=2e-3,
        steps=6000,
        chunk=200,
        batch=32,
        seq=256,
        held_out=16,
        warm_up=200,
        control_steps=400,
    ),
    "lstm": Size(
        small=LSTMConfig(data.VOCAB, 128, 320, 1),
        targets={
            "width": Target(
                LSTMConfig(data.VOCAB, 256, 640, 1), 2e-3, 0.25, FRESH_UNITS, LSTM_EXTRA
            )
        },
        rate=4e-3,
        steps=3000,
        chunk=200,
        batch=32,
        seq=256,
        held_out=16,
        warm_up=200,
        control_steps=400,
    ),
}


def sizes(options: Options) -> Mapping[str, Size]:
    """Return the models of the mode."""
    return FULL if options.full else QUICK


def cases(options: Options) -> Sequence[Case]:
    """Return one case per model and seed; the first seed has the extra rows too."""
    seeds = range(options.seed + TUNED_ON + 1, options.seed + TUNED_ON + 1 + SEEDS)
    return [
        Case(f"{name}-seed{seed}", partial(run_case, size, seed, seed == seeds[0]))
        for name, size in sizes(options).items()
        for seed in seeds
    ]


def config(options: Options) -> Mapping[str, Any]:
    """Return the models' sizes, rates and schedules."""
    return {name: asdict(size) for name, size in sizes(options).items()}


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the tables, the plots and the claims."""
    grouped = {
        name: [one for case, one in results.items() if case.startswith(f"{name}-seed")]
        for name in sizes(options)
    }
    return _grow_report.report(grouped)


BENCHMARK = Benchmark(
    name="grow",
    summary="growing trained models against training large ones from scratch: FLOPs to equal loss",
    cases=cases,
    report=report,
    needs_data=True,
    config=config,
)
