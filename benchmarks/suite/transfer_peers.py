"""`transfer_peers`: the factors of ``us.transfer`` beside those of mup and unit-scaling.

Both are PyTorch packages.
The same small Transformer in both frameworks, leaf by leaf, and trained; needs ``pip install torch
mup unit-scaling`` and says so where they are not.
"""

from __future__ import annotations

from benchmarks.registry import Benchmark, Options, Report, Result
from benchmarks.suite import _transfer_peers as peers


def report(results: dict[str, Result], options: Options) -> Report:
    """Return what is the same, what differs and why."""
    del options
    return Report(
        tables=tuple(peers.tables(results)),
        claims=tuple(peers.claims(results)),
        notes=tuple(peers.notes(results)),
    )


BENCHMARK = Benchmark(
    name="transfer_peers",
    summary="μP factors beside those of PyTorch's mup and unit-scaling",
    cases=peers.cases,
    report=report,
)
