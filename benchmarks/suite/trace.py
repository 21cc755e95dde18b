"""`trace`: how long it takes to read a Transformer's axes and factors off its program.

An unrolled decoder (grouped-query attention, rotary positions, SwiGLU) of 4 to 32 layers at the
sizes of an 8 B model, as shapes, and the same model twice as wide. Nothing but Python runs.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import uscale_jax as us
from benchmarks.models.functional import TransformerConfig
from benchmarks.models.transformer_linen import Transformer
from benchmarks.registry import (
    Benchmark,
    Case,
    Claim,
    Options,
    Panel,
    Plot,
    Progress,
    Report,
    Result,
    Series,
    Table,
)
from uscale_jax.trace import tracing

REPEATS = 3
LIMIT_S = 3.0
JAX, AXES, VALUES, GROWTH, OURS = "JAX alone", "axes", "values", "growth", "growth, our part"


def model(layers: int, widening: int) -> tuple[Callable[..., Any], Any]:
    """Return a decoder and its parameter shapes."""
    config = TransformerConfig(
        vocab=32_000,
        hidden=4096 * widening,
        layers=layers,
        heads=32 * widening,
        kv_heads=8 * widening,
        head_dim=128,
        mlp=14_336 * widening,
    )
    module = Transformer(config)
    params = jax.eval_shape(lambda t: module.init(jax.random.key(0), t), tokens())
    return lambda p, t: module.apply(p, t), params


def tokens() -> np.ndarray:
    """Return token ids."""
    return np.zeros((3, 17), np.int32)


def work(layers: int) -> dict[str, Callable[[], Any]]:
    """Return what is timed."""
    (apply, params), (wide, wide_params) = model(layers, 1), model(layers, 2)
    x = tokens()
    jaxpr = lambda f, p: jax.make_jaxpr(f)(p, jax.ShapeDtypeStruct(x.shape, x.dtype))  # noqa: E731
    return {
        JAX: lambda: (jaxpr(apply, params), jaxpr(wide, wide_params)),
        GROWTH: lambda: us.trace_exponents(apply, params, x, big=(wide, wide_params)),
        AXES: lambda: us.trace_axes(apply, params, x),
        VALUES: lambda: us.trace_exponents(apply, params, x),
    }


def run_layers(layers: int, options: Options, progress: Progress) -> Result:
    """Time one depth: with JAX's caches cleared before each call, and ours alone."""
    del options
    timed = work(layers)
    progress.start(len(timed) + 1, f"{layers} layers")
    seconds: dict[str, float] = {}
    for name, run in timed.items():
        seconds[name] = min(_cold(run) for _ in range(REPEATS))
        progress.advance(note=f"{name}: {seconds[name]:.2f} s")
    timed[GROWTH]()  # JAX now has both programs in its caches
    seconds[OURS] = min(_seconds(timed[GROWTH]) for _ in range(REPEATS))
    progress.advance(note=f"ours alone: {seconds[OURS]:.2f} s")
    apply, params = model(layers, 1)
    traced = tracing.trace([tracing.Model(apply, params)], [tokens()])
    return {
        "layers": layers,
        "leaves": len(traced.leaves),
        "equations": len(traced.structure.program.equations),
        "seconds": seconds,
    }


def _cold(run: Callable[[], Any]) -> float:
    jax.clear_caches()
    return _seconds(run)


def _seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def depths(options: Options) -> tuple[int, ...]:
    """Return the numbers of layers."""
    return (4, 8, 16, 32, 64, 128) if options.full else (4, 8, 16, 32)


def cases(options: Options) -> Sequence[Case]:
    """Return one case per depth."""
    return [Case(f"{n} layers", partial(run_layers, n)) for n in depths(options)]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the table, the plot and the claims."""
    del options
    ordered = sorted(results.values(), key=lambda r: r["layers"])
    return Report(tables=(_table(ordered),), plots=(_plot(ordered),), claims=_claims(ordered))


def _table(results: Sequence[Result]) -> Table:
    names = (JAX, AXES, VALUES, GROWTH, OURS)
    columns = ("layers", "leaves", "equations", *names, "µs/equation")
    rows = [
        (
            str(r["layers"]),
            str(r["leaves"]),
            str(r["equations"]),
            *(f"{r['seconds'][name]:.3f}" for name in names),
            f"{1e6 * _per_equation(r):.0f}",
        )
        for r in results
    ]
    return Table("Seconds, JAX's caches cleared before each call", columns, tuple(rows))


def _per_equation(result: Result) -> float:
    return result["seconds"][OURS] / result["equations"]


def _plot(results: Sequence[Result]) -> Plot:
    x = tuple(float(r["equations"]) for r in results)
    series = tuple(
        Series(name, x, tuple(r["seconds"][name] for r in results), color=i)
        for i, name in enumerate((GROWTH, JAX, OURS))
    )
    panel = Panel("Reading a Transformer", "equations", "seconds", series, scale="log")
    return Plot("trace", "Time to trace and solve", (panel,))


def _claims(results: Sequence[Result]) -> tuple[Claim, ...]:
    at_32 = next(r for r in results if r["layers"] == 32)["seconds"]
    first, last = _per_equation(results[0]), _per_equation(results[-1])
    return (
        Claim(
            f"32 layers, small and big, trace and solve in {LIMIT_S:g} s",
            at_32[GROWTH] <= LIMIT_S,
            f"{at_32[GROWTH]:.2f} s, of which JAX alone takes {at_32[JAX]:.2f} s",
        ),
        Claim(
            "linear in the number of equations",
            last <= 2 * first,
            f"{1e6 * first:.0f} µs an equation at {results[0]['layers']} layers, "
            f"{1e6 * last:.0f} µs at {results[-1]['layers']}",
        ),
    )


BENCHMARK = Benchmark(
    name="trace",
    summary="seconds to read axes and factors off an unrolled Transformer of 4 to 32 layers",
    cases=cases,
    report=report,
)
