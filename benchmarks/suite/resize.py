"""`resize`: how fast models are planned and grown, and how much memory that takes.

Plans of an unrolled decoder (grouped-query attention, rotary positions, SwiGLU) at the sizes of an
8 B model, as shapes; growth to twice the width against copying what comes out, each model in a
process of its own; Apple's ml-hypercloning on the same Llama, where it is installed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

import uscale_jax as us
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
from benchmarks.suite import _resize_grow as work
from benchmarks.suite._resize_grow import COPY, GROW, PEER, Size
from benchmarks.suite.trace import model
from uscale_jax.trace import tracing

LIMIT_S, COPIES, AHEAD, BANDWIDTH = 3.0, 1.5, 5.0, 0.85
REPEATS = 3
GIB = 2**30

SMALL = (Size(10, 4, 128), Size(60, 4, 384), Size(200, 8, 768))
LARGE = (Size(600, 12, 1152), Size(1500, 24, 1152, "bfloat16"))
PEER_SIZE = Size(60, 4, 384)


def depths(options: Options) -> tuple[int, ...]:
    """Return the numbers of layers."""
    return (2, 4, 8, 16, 32, 64) if options.full else (2, 4, 8, 16, 32)


def run_plan(layers: int, options: Options, progress: Progress) -> Result:
    """Time a plan, JAX's caches cleared before each; and again, what JAX does in its caches."""
    del options
    (apply, params), (wide, wide_params) = model(layers, 1), model(layers, 2)
    tokens = jax.ShapeDtypeStruct((3, 17), np.int32)
    progress.start(2 * REPEATS, f"{layers} layers")

    def seconds(cold: bool) -> float:
        if cold:
            jax.clear_caches()
        start = time.perf_counter()
        us.plan(apply, params, wide, wide_params, tokens)
        progress.advance()
        return time.perf_counter() - start

    cold, warm = (min(seconds(first) for _ in range(REPEATS)) for first in (True, False))
    traced = tracing.trace([tracing.Model(apply, params)], [np.zeros((3, 17), np.int32)])
    equations = len(traced.structure.program.equations)
    return {"layers": layers, "equations": equations, "seconds": cold, "own_seconds": warm}


def free_bytes() -> int | None:
    """Return how much memory is free, where the system says it."""
    try:
        text = open("/proc/meminfo").read()  # noqa: SIM115
    except OSError:
        return None
    [line] = [line for line in text.splitlines() if line.startswith("MemAvailable")]
    return int(line.split()[1]) * 1024


def needed_bytes(size: Size) -> int:
    """Return the memory for both models and a copy of the larger one."""
    shapes = [work.count(work.model(size, widening)[1]) for widening in (1, 2, 2)]
    return sum(shapes) * np.dtype(jax.numpy.dtype(size.dtype)).itemsize + 2**30


def run_grow(size: Size, options: Options, progress: Progress) -> Result:
    """Grow one model, where there is room."""
    progress.start(1, size.name)
    free, needed = free_bytes(), needed_bytes(size)
    if free is not None and free < needed:
        return {"skipped": f"needs {needed / GIB:.1f} GiB, {free / GIB:.1f} GiB are free"}
    result = work.in_own_process("grow", size, 60.0 if options.full else 15.0, options.seed)
    progress.advance(note=f"{result['timings'][GROW]['ratio']:.2f} of a copy")
    return result


def run_peer(size: Size, options: Options, progress: Progress) -> Result:
    """Compare with ml-hypercloning, where it is installed."""
    progress.start(1, PEER)
    if missing := work.peer_missing():
        return {"skipped": f"not installed: {', '.join(missing)}"}
    result = work.in_own_process("peer", size, 60.0, options.seed)
    progress.advance()
    return result


def cases(options: Options) -> Sequence[Case]:
    """Return the plans, the models, and the peer."""
    sizes = (*SMALL, *LARGE) if options.full else SMALL
    return [
        *(Case(f"plan, {n} layers", partial(run_plan, n)) for n in depths(options)),
        *(Case(f"grow, {size.name}", partial(run_grow, size)) for size in sizes),
        Case("peer", partial(run_peer, PEER_SIZE)),
    ]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the tables, the plot, the claims, and what was left out."""
    del options
    plans = [r for name, r in results.items() if name.startswith("plan")]
    named = {name: r for name, r in results.items() if name.startswith("grow")}
    grown = {name: r for name, r in named.items() if "skipped" not in r}
    peer = results["peer"]
    left_out = [f"{n}: {r['skipped']}" for n, r in results.items() if "skipped" in r]
    return Report(
        tables=(_plan_table(plans), _grow_table(grown), *_peer_table(peer)),
        plots=(_plot(plans),),
        claims=(*_plan_claims(plans), *_grow_claims(grown), *_peer_claims(peer)),
        notes=(f"{os.cpu_count()} CPU cores.", *left_out),
    )


def _plan_table(plans: Sequence[Result]) -> Table:
    columns = ("layers", "equations", "plan (s)", "again (s)", "µs/equation")
    rows = [
        (
            str(r["layers"]),
            str(r["equations"]),
            f"{r['seconds']:.2f}",
            f"{r['own_seconds']:.2f}",
            f"{_per_equation(r):.0f}",
        )
        for r in plans
    ]
    return Table("Plans: caches cleared, and again", columns, tuple(rows))


def _per_equation(result: Result) -> float:
    """Microseconds an equation."""
    return float(1e6 * result["seconds"] / result["equations"])


def _grow_table(grown: dict[str, Result]) -> Table:
    columns = ("model", "output", "grow (ms)", "copy (ms)", "grow/copy", "peak memory", "GiB/s")
    rows = []
    for name, r in grown.items():
        own, copy = r["timings"][GROW], r["timings"][COPY]
        rows.append(
            (
                name.removeprefix("grow, "),
                f"{r['output_bytes'] / GIB:.2f} GiB",
                f"{1e3 * own['median_s']:.0f}",
                f"{1e3 * copy['median_s']:.0f}",
                f"{own['ratio']:.2f}",
                f"{r['peak_bytes'] / r['output_bytes']:.2f} × output",
                f"{_moved(r) / own['median_s'] / GIB:.1f}",
            )
        )
    return Table("Twice as wide", columns, tuple(rows))


def _moved(result: Result) -> float:
    """The bytes that growth reads and writes."""
    small, big = result["parameters"]
    return float(result["output_bytes"] * (1 + small / big))


def _peer_table(peer: Result) -> tuple[Table, ...]:
    if "skipped" in peer:
        return ()
    rows = [(name, f"{1e3 * peer['timings'][name]['median_s']:.0f}") for name in (GROW, PEER)]
    return (Table("The same Llama", ("", "ms"), tuple(rows)),)


def _plot(plans: Sequence[Result]) -> Plot:
    x = tuple(float(r["equations"]) for r in plans)
    series = (
        Series("caches cleared", x, tuple(r["seconds"] for r in plans), color=0),
        Series("again", x, tuple(r["own_seconds"] for r in plans), color=1),
    )
    panel = Panel("A plan of a decoder", "equations", "seconds", series, scale="log")
    return Plot("resize", "Time of a plan", (panel,))


def _plan_claims(plans: Sequence[Result]) -> list[Claim]:
    at_32 = next(r for r in plans if r["layers"] == 32)
    first, last = _per_equation(plans[0]), _per_equation(plans[-1])
    detail = f"{first:.0f} µs an equation at {plans[0]['layers']} layers, {last:.0f} µs at "
    return [
        Claim(
            f"a plan for 32 layers in {LIMIT_S:g} s",
            at_32["seconds"] <= LIMIT_S,
            f"{at_32['seconds']:.2f} s",
        ),
        Claim(
            "linear in the number of equations", last <= 2 * first, f"{detail}{plans[-1]['layers']}"
        ),
    ]


def _grow_claims(grown: dict[str, Result]) -> list[Claim]:
    claims = []
    for name, r in grown.items():
        ratio, over = r["timings"][GROW]["ratio"], r["peak_bytes"] - r["output_bytes"]
        room = r["largest_leaf_bytes"] + 2**28
        claims.append(Claim(f"{name}: {COPIES:g} copies", ratio <= COPIES, f"{ratio:.2f}"))
        claims.append(
            Claim(
                f"{name}: memory for the result, one leaf and 256 MiB",
                over <= room,
                f"{over / 2**20:.0f} MiB besides the result",
            )
        )
        if r["backend"] == "gpu":
            share = _moved(r) / (2 * r["output_bytes"]) / ratio
            text = f"{name}: {BANDWIDTH:g} of a copy's bandwidth"
            claims.append(Claim(text, share >= BANDWIDTH, f"{share:.2f}"))
    return claims


def _peer_claims(peer: Result) -> list[Claim]:
    if "skipped" in peer:
        return []
    gain = peer["timings"][PEER]["median_s"] / peer["timings"][GROW]["median_s"]
    return [Claim(f"{AHEAD:g} times as fast as {PEER}", gain >= AHEAD, f"{gain:.1f} times")]


def config(options: Options) -> dict[str, Any]:
    """Return the models."""
    sizes = (*SMALL, *LARGE) if options.full else SMALL
    return {"layers": depths(options), "sizes": [size.name for size in sizes]}


BENCHMARK = Benchmark(
    name="resize",
    summary="seconds and memory for plans and for growth against copying, and ml-hypercloning",
    cases=cases,
    report=report,
    config=config,
)
