"""`numerics_peers`: unit-scaled operations beside those of Graphcore's ``unit-scaling``.

A PyTorch package.  Outputs and all gradients on the same numbers, what differs and by what factor,
and which is nearer to scale one; needs ``pip install torch unit-scaling`` and says so where they
are not.
"""

from __future__ import annotations

from benchmarks.registry import Benchmark, Options, Report, Result
from benchmarks.suite import _numerics_peers as peers


def report(results: dict[str, Result], options: Options) -> Report:
    """Return what is the same, what differs and why."""
    del options
    return Report(peers.tables(results), claims=peers.claims(results), notes=peers.notes(results))


BENCHMARK = Benchmark(
    name="numerics_peers",
    summary="unit-scaled operations beside those of PyTorch's unit-scaling",
    cases=peers.cases,
    report=report,
)
