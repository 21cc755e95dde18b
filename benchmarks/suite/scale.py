"""`scale`: how fast `scale_params` is, against copying the same bytes and against doing it by hand.

A scaling reads and writes every byte once, so a device copy of the same tree is its bound.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import cycle
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

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
from benchmarks.timing import compile_stats, measure

K = 1.25
MIB = 2**20
COPY, SCALE = "device copy", "scale_params"
CALL, EAGER, NUMPY = "scale_params, called", "optax.tree.scale, eager", "NumPy, leaf by leaf"

Tree = dict[str, Any]


@dataclass(frozen=True)
class Size:
    """A tree of ``leaves`` float32 leaves with ``total`` bytes together."""

    leaves: int
    total: int

    @property
    def name(self) -> str:
        """Return the name of the case."""
        return f"{self.leaves} leaves, {_bytes(self.total)}"


def _bytes(total: int) -> str:
    return f"{total / MIB:.3g} MiB" if total < 1024 * MIB else f"{total / MIB / 1024:.3g} GiB"


def sizes(options: Options) -> tuple[Size, ...]:
    """Return the trees measured: many small leaves, few large ones, and up to 2 GiB in full."""
    small = (Size(10, 10 * 1024), Size(100, 100 * 1024), Size(1000, 1000 * 1024))
    large = (Size(10, 64 * MIB), Size(100, 256 * MIB), Size(1000, 512 * MIB))
    return small + large + ((Size(10, 2048 * MIB), Size(1000, 2048 * MIB)) if options.full else ())


def make_tree(size: Size, seed: int) -> Tree:
    """Return the tree: layers of ten matrices with eight columns each."""
    rng = np.random.default_rng(seed)
    rows = size.total // size.leaves // 4 // 8
    leaf = jnp.asarray(rng.standard_normal((rows, 8)), jnp.float32)
    return {
        f"layer_{i}": {f"kernel_{j}": leaf + i + j for j in range(10)}
        for i in range(size.leaves // 10)
    }


def into_kept_buffers(function: Callable[[Tree], Tree], tree: Tree) -> Callable[[], Tree]:
    """Return a thunk that writes ``function(tree)`` into the same buffers at every call.

    Fresh buffers cost page faults, which on a CPU take longer than the work itself.
    """
    write = jax.jit(lambda t, spare: function(t), donate_argnums=1, keep_unused=True)
    kept = [jax.tree.map(jnp.copy, tree)]

    def thunk() -> Tree:
        kept.append(write(tree, kept.pop()))
        return kept[0]

    return thunk


def in_place(tree: Tree) -> Callable[[], Tree]:
    """Return a thunk that scales one tree up and down in turn, in its own buffers."""
    write = jax.jit(us.scale_params, donate_argnums=0)
    kept, factors = [jax.tree.map(jnp.copy, tree)], cycle((jnp.float32(2.0), jnp.float32(0.5)))

    def thunk() -> Tree:
        kept.append(write(kept.pop(), next(factors)))
        return kept[0]

    return thunk


def kernels(tree: Tree) -> dict[str, Callable[[], Any]]:
    """Return the compiled programs that are timed, without allocation of their outputs."""
    return {
        COPY: into_kept_buffers(lambda t: jax.tree.map(jnp.copy, t), tree),
        SCALE: into_kept_buffers(lambda t: us.scale_params(t, K), tree),
        "scale_params, in place": in_place(tree),
    }


def calls(tree: Tree) -> dict[str, Callable[[], Any]]:
    """Return what people call, outputs allocated."""
    host = jax.tree.map(np.asarray, tree)
    return {
        CALL: lambda: us.scale_params(tree, K),
        EAGER: lambda: optax.tree.scale(K, tree),
        NUMPY: lambda: jax.tree.map(lambda x: np.float32(K) * x, host),
    }


def run_size(size: Size, options: Options, progress: Progress) -> Result:
    """Measure one tree: check the answers, compile apart, then time."""
    progress.start(4, size.name)
    tree = make_tree(size, options.seed)
    called = calls(tree)
    error = _largest_error(called[CALL](), called[NUMPY]())
    progress.advance(note="checked")
    out_of_place = compile_stats(lambda t: us.scale_params(t, K), tree)
    scale = jax.jit(lambda t: us.scale_params(t, K), donate_argnums=0)
    donated = compile_stats(scale, tree)
    progress.advance(note="compiled")
    budget = 20.0 if options.full else 6.0
    timings = measure(kernels(tree), repeats=40, budget_s=budget)
    progress.advance(note="kernels timed")
    timings |= measure(called, 200, budget, reference=EAGER, min_sample_s=0.02)
    progress.advance(note="calls timed")
    return {
        "leaves": size.leaves,
        "bytes": size.total,
        "largest_error": error,
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "out_of_place": asdict(out_of_place),
        "in_place": asdict(donated),
    }


def _largest_error(got: Tree, expected: Tree) -> float:
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    return max(float(np.max(np.abs(np.asarray(a) - b))) for a, b in pairs)


def cases(options: Options) -> Sequence[Case]:
    """Return one case per tree."""
    return [Case(size.name, partial(run_size, size)) for size in sizes(options)]


def report(results: dict[str, Result], options: Options) -> Report:
    """Return the tables, the plot and the two claims."""
    del options
    large = [r for r in results.values() if r["bytes"] >= 64 * MIB]
    small = [r for r in results.values() if r["leaves"] == 1000 and r["bytes"] < 64 * MIB]
    return Report(
        tables=(_time_table(results), _memory_table(results)),
        plots=(_plot(results),),
        claims=(*_copy_claims(large), *_eager_claims(small), _exact_claim(results)),
    )


def _time_table(results: dict[str, Result]) -> Table:
    names = list(next(iter(results.values()))["timings"])
    rows = []
    for case, result in results.items():
        times = {name: result["timings"][name]["best_s"] for name in names}
        rate = 2 * result["bytes"] / times[SCALE] / 2**30
        cells = [f"{1e3 * times[name]:.2f}" for name in names]
        rows.append((case, *cells, f"{rate:.2f}"))
    columns = ("tree, ms", *names, "GiB/s")
    return Table("Best time per call", columns, tuple(rows))


def _memory_table(results: dict[str, Result]) -> Table:
    def row(case: str, result: Result) -> tuple[str, ...]:
        out, donated = result["out_of_place"], result["in_place"]
        peak = lambda s: sum(s[f"{part}_bytes"] or 0 for part in ("argument", "output", "temp"))  # noqa: E731
        return (
            case,
            _bytes(result["bytes"]),
            _bytes(int(out["bytes_accessed"] or 0)),
            _bytes(peak(out)),
            _bytes(peak(donated) - (donated["alias_bytes"] or 0)),
            f"{out['compile_s']:.2f}",
        )

    columns = ("tree", "size", "bytes moved", "peak memory", "peak, donated", "compile (s)")
    return Table(
        "What the compiler says", columns, tuple(row(name, r) for name, r in results.items())
    )


def _plot(results: dict[str, Result]) -> Plot:
    names = list(next(iter(results.values()))["timings"])
    cases_ = tuple(results)
    series = tuple(
        Series(
            name,
            cases_,
            tuple(1e3 * results[case]["timings"][name]["best_s"] for case in cases_),
            color=i,
        )
        for i, name in enumerate(names)
    )
    panel = Panel("Time to scale a tree", "best time per call (ms)", "", series, "bar", "log")
    return Plot("times", "scale_params against copying and against doing it by hand", (panel,))


def _copy_claims(results: list[Result]) -> list[Claim]:
    """At least 0.9 of copy speed: the median over rounds of the two times within one round."""
    claims = []
    for result in results:
        speed = 1 / result["timings"][SCALE]["ratio"]
        claims.append(
            Claim(
                f"at least 0.9 of copy speed on {result['leaves']} leaves, "
                f"{_bytes(result['bytes'])}",
                speed >= 0.9,
                f"{speed:.2f} of copy speed",
            )
        )
    return claims


def _eager_claims(results: list[Result]) -> list[Claim]:
    claims = []
    for result in results:
        times = result["timings"]
        gain = times[EAGER]["best_s"] / times[CALL]["best_s"]
        claims.append(
            Claim(
                f"at least 5 times faster than eager scaling on {result['leaves']} small leaves",
                gain >= 5,
                f"{gain:.1f} times",
            )
        )
    return claims


def _exact_claim(results: dict[str, Result]) -> Claim:
    worst = max(result["largest_error"] for result in results.values())
    return Claim("equal to NumPy's float32 product, bit for bit", worst == 0, f"error {worst}")


BENCHMARK = Benchmark(
    name="scale",
    summary="scale_params against a device copy, eager scaling and NumPy, 10 to 1,000 leaves",
    cases=cases,
    report=report,
)
