"""`coverage`: what the tracer finds in every model of the zoo, and in models of other packages.

Per model: parameter leaves, equations of the flat program, axes free and fixed, seconds to read
them; and for every named size whether factors exist that keep the function when it doubles.
Everything is shapes. The tests grow the zoo's models in float64 and compare outputs.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import partial

import jax

import uscale_jax as us
from benchmarks.foreign.registry import foreign_models
from benchmarks.registry import (
    Benchmark,
    Case,
    Claim,
    Options,
    Progress,
    Report,
    Result,
    Table,
)
from benchmarks.zoo.registry import Built, Model, models
from uscale_jax.trace import tracing

ZOO, OTHERS = "zoo", "others"


def run_model(model: Model, group: str, options: Options, progress: Progress) -> Result:
    """Read one model, then try to double each of its named sizes."""
    del options
    sizes = [*model.free, *model.fixed]
    progress.start(len(sizes) + 1, model.name)
    small = model.build(model.sizes)
    jax.clear_caches()
    start = time.perf_counter()
    axes = us.trace_axes(small.apply, small.params, *small.inputs)
    seconds = time.perf_counter() - start
    traced = tracing.trace([tracing.Model(small.apply, small.params)], small.inputs)
    progress.advance(note="axes read")
    outcome = {}
    for size in sizes:
        outcome[size] = _double(model, small, size)
        progress.advance(note=size)
    return {
        "group": group,
        "leaves": len(axes.leaves),
        "equations": len(traced.structure.program.equations),
        "axes_free": len(axes.free),
        "axes_fixed": len(axes.fixed),
        "seconds": seconds,
        "free": list(model.free),
        "fixed": dict(model.fixed),
        "refusals": outcome,
    }


def _double(model: Model, small: Built, size: str) -> str:
    """The refusal to double a size; empty where factors were found."""
    big = model.build({**model.sizes, size: 2 * model.sizes[size]})
    try:
        us.trace_exponents(small.apply, small.params, *small.inputs, big=(big.apply, big.params))
    except ValueError as refusal:
        return str(refusal)
    return ""


def cases(options: Options) -> Sequence[Case]:
    """Return one case per model."""
    del options
    zoo, (others, _) = models(), foreign_models()
    groups = ((ZOO, zoo), (OTHERS, others))
    return [
        Case(name, partial(run_model, model, group))
        for group, found in groups
        for name, model in found.items()
    ]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return a table per group, the claims, and what was not there to be tried."""
    del options
    groups = {g: {n: r for n, r in results.items() if r["group"] == g} for g in (ZOO, OTHERS)}
    claims = [claim for group, found in groups.items() for claim in _claims(group, found)]
    missing = foreign_models()[1]
    notes = [f"{len(missing)} models of other packages not tried: {_packages(missing)} not here"]
    return Report(
        tables=tuple(_table(group, found) for group, found in groups.items() if found),
        claims=tuple(claims),
        notes=tuple(notes) if missing else (),
    )


def _packages(missing: Mapping[str, str]) -> str:
    return ", ".join(sorted(set(missing.values())))


def _table(group: str, results: Mapping[str, Result]) -> Table:
    columns = ("model", "leaves", "equations", "free", "fixed", "ms", "grow", "refused")
    rows = [
        (
            name,
            *(str(r[key]) for key in ("leaves", "equations", "axes_free", "axes_fixed")),
            f"{1e3 * r['seconds']:.0f}",
            ", ".join(size for size, why in r["refusals"].items() if not why),
            ", ".join(size for size, why in r["refusals"].items() if why),
        )
        for name, r in results.items()
    ]
    return Table(f"Axes and sizes of the models ({group})", columns, tuple(rows))


def _claims(group: str, results: Mapping[str, Result]) -> list[Claim]:
    """Free sizes grow, fixed ones are refused for the reason that the model's author gives."""
    free = [(n, s, r["refusals"][s]) for n, r in results.items() for s in r["free"]]
    fixed = [(n, s, w, r["refusals"][s]) for n, r in results.items() for s, w in r["fixed"].items()]
    stuck = [f"{name}: {size}" for name, size, why in free if why]
    wrong = [f"{name}: {size}" for name, size, word, why in fixed if word not in why]
    return [
        Claim(f"{group}: every free size grows", not stuck, _detail(len(free), stuck)),
        Claim(f"{group}: fixed sizes are refused, and why", not wrong, _detail(len(fixed), wrong)),
    ]


def _detail(total: int, failing: Sequence[str]) -> str:
    return f"{total - len(failing)} of {total}" + (f"; not {'; '.join(failing)}" if failing else "")


BENCHMARK = Benchmark(
    name="coverage",
    summary="axes, factors and refusals of every model of the zoo and of other packages",
    cases=cases,
    report=report,
)
