"""`fp8`: a unit-scaled Transformer whose linear layers multiply float8, against bfloat16.

On real text, with the same seeds, beside the same Transformer in the standard parametrization: the
same products, whose scales are 1, break it, and a census of what they flush to zero says where.

Learning rates were chosen on seed 0 in bfloat16, of powers of √2; for standard float8 beside that,
of powers of 2. Later seeds are reported.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import jax.numpy as jnp
import numpy as np

from benchmarks import data
from benchmarks.models.functional import TransformerConfig
from benchmarks.registry import Benchmark, Case, Options, Progress, Report, Result
from benchmarks.suite import _fp8_report
from benchmarks.suite._fp8_products import census, flops_by_role
from benchmarks.suite._fp8_train import DOTS, LOOKS, Setting, Trained, Variant, trained

# Sizes whose fan-ins are powers of 4, so that factors are powers of two as they are, and all
# products have the same ones.
QUICK = Setting(
    sizes=TransformerConfig(data.VOCAB, 64, 3, 4, 2, 16, 256),
    steps=600,
    batch=16,
    seq=64,
    held_out=32,
    seeds=4,
    unit_rate=2**0.5,
    standard_rate=2**-6.5,
    standard_float8_rate=2**-9.5,
)
# Not tuned: of unit scaling, the learning rate stays; standard ones go with the width.
FULL = replace(
    QUICK,
    sizes=TransformerConfig(data.VOCAB, 256, 6, 8, 4, 32, 1024),
    steps=3000,
    batch=32,
    seq=128,
    standard_rate=2**-8.5,
    standard_float8_rate=2**-11.5,
)
CENSUS = (
    Variant("unit-scaled", "float8"),
    Variant("standard", "bfloat16"),
    Variant("standard", "float8"),
)
"""Where it is looked at what float8 flushes; of bfloat16, what it would."""


def setting(options: Options) -> Setting:
    """Return the setting of the mode."""
    return FULL if options.full else QUICK


def run_case(
    variant: Variant, seed: int, looked_at: bool, options: Options, progress: Progress
) -> Result:
    """Train one variant on one seed."""
    progress.start(LOOKS, "looks")
    how, start = setting(options), time.perf_counter()
    run = trained(variant, how, options.data, seed, progress)
    found = {"census": ends(variant, how, run, options.data, seed)} if looked_at else {}
    return {**run.curve, **found, "seconds": time.perf_counter() - start}


def ends(variant: Variant, how: Setting, run: Trained, path: Any, seed: int) -> Result:
    """Return what float8 flushes on the first batch, before training and after."""
    batch = jnp.asarray(how.text(path, seed).windows(0)[0].astype(np.int32))
    look = census(variant, how)
    return {"first": look(run.first, batch), "last": look(run.last, batch)}


def run_products(options: Options, progress: Progress) -> Result:
    """Count the FLOPs of all variants."""
    progress.start(len(DOTS), "programs")
    found = {}
    for variant in DOTS:
        found[variant.name] = flops_by_role(variant, setting(options))
        progress.advance(note=variant.name)
    return found


def cases(options: Options) -> Sequence[Case]:
    """Return the count of FLOPs, and one case per variant and seed."""
    first = options.seed + 1
    runs = [
        Case(
            f"{variant.name}, seed {seed}",
            partial(run_case, variant, seed, seed == first and variant in CENSUS),
        )
        for variant in DOTS
        for seed in range(first, first + setting(options).seeds_of(variant))
    ]
    return [Case("products", run_products), *runs]


def config(options: Options) -> Mapping[str, Any]:
    """Return sizes and schedule."""
    return asdict(setting(options))


def report(results: dict[str, Result], options: Options) -> Report:
    """Return losses, FLOPs, what is flushed, and what is claimed of them."""
    del options
    return _fp8_report.report(results)


BENCHMARK = Benchmark(
    name="fp8",
    summary="a unit-scaled Transformer in float8 against bfloat16, and the standard one",
    cases=cases,
    report=report,
    needs_data=True,
    config=config,
)
