"""The transfer benchmark's sweeps as tables, U-curves and claims, from saved results."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from benchmarks.registry import Claim, Panel, Plot, Result, Series, Table
from benchmarks.suite._transfer_sweep import STEP, losses, optimum, rate

WORDS = {"width": "width", "depth": "layers"}
PLAIN = {"width": "standard", "depth": "mup"}
"""What the rules of a way are compared with."""
ALLOWED = STEP / 2
"""How far an optimum may move: half a step of the grid, in powers of two."""
SLACK = 0.01
"""By how many bits a larger model may be worse at equal learning rate: what seeds differ by."""


def grouped(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Return the sweeps of every rule, the smallest first; the base model's is that of all."""
    rules = dict.fromkeys(r["rule"] for r in results)
    base = [r for r in results if r["factor"] == 1]
    return {
        rule: sorted(
            [*base[:1], *(r for r in results if r["rule"] == rule and r["factor"] > 1)],
            key=lambda r: r["size"],
        )
        for rule in rules
    }


def shift(sweeps: Sequence[Result]) -> float:
    """Return by how many powers of two the optimum moves from the first to the last."""
    return optimum(losses(sweeps[-1])) - optimum(losses(sweeps[0]))


def doublings(sweeps: Sequence[Result]) -> float:
    """Return how often the size doubles."""
    return math.log2(sweeps[-1]["size"] / sweeps[0]["size"])


# Tables


def tables(way: str, results: Sequence[Result]) -> Iterator[Table]:
    """Yield the best learning rates by rule and size, and all losses."""
    rules = grouped(results)
    sizes = [r["size"] for r in next(iter(rules.values()))]
    rows = []
    for rule, sweeps in rules.items():
        best = [f"{2 ** optimum(losses(r)):.5f}" for r in sweeps]
        low = [f"{min(losses(r).values()):.3f}" for r in sweeps]
        moved = f"{shift(sweeps) / doublings(sweeps):+.2f}"
        rows.append((rule, *(f"{a} ({b})" for a, b in zip(best, low, strict=True)), moved))
    columns = ("rule", *(f"{WORDS[way]} {n}" for n in sizes), "log₂ shift per doubling")
    title = f"Best learning rate by {WORDS[way]} (held-out bits/byte there)"
    yield Table(title, columns, tuple(rows))
    yield _all(way, rules)


def _all(way: str, rules: Mapping[str, Sequence[Result]]) -> Table:
    points = sorted({i for sweeps in rules.values() for r in sweeps for i in losses(r)})
    rows = [
        (f"{rule}, {r['size']}", *(_cell(losses(r), i) for i in points))
        for rule, sweeps in rules.items()
        for r in sweeps
    ]
    columns = (f"rule, {WORDS[way]}", *(f"{rate(i):.5f}" for i in points))
    return Table("Held-out bits/byte by learning rate; * is the lowest", columns, tuple(rows))


def _cell(curve: Mapping[int, float], index: int) -> str:
    if index not in curve:
        return ""
    mark = "*" if curve[index] == min(curve.values()) else ""
    return f"{curve[index]:.3f}{mark}" if math.isfinite(curve[index]) else "not finite"


# Plots


def plots(way: str, results: Sequence[Result]) -> Iterator[Plot]:
    """Yield the U-curves, a panel per rule, with their minima."""
    panels = tuple(_panel(way, rule, sweeps) for rule, sweeps in grouped(results).items())
    yield Plot(f"lr-transfer-{way}", f"Loss by learning rate and {WORDS[way]}", panels)


def _panel(way: str, rule: str, sweeps: Sequence[Result]) -> Panel:
    series, marks = [], []
    for color, result in enumerate(sweeps):
        curve = losses(result)
        y = tuple(bits if math.isfinite(bits) else None for bits in curve.values())
        x = tuple(STEP * index for index in curve)
        series.append(Series(f"{WORDS[way]} {result['size']}", x, y, color=2 * color, dash=0))
        marks.append((optimum(curve), "minima"))
    return Panel(
        f"{rule}: {shift(sweeps) / doublings(sweeps):+.2f} per doubling",
        "log₂ learning rate",
        "held-out bits/byte",
        tuple(series),
        marks=tuple(marks),
    )


# Claims


def claims(way: str, results: Sequence[Result]) -> Iterator[Claim]:
    """Yield that optima stay where they are, and that larger models are no worse there."""
    rules = grouped(results)
    plain = rules.pop(PLAIN[way])
    for rule, sweeps in rules.items():
        spread = _spread(sweeps)
        yield Claim(
            f"{way}, {rule}: the best learning rate stays within half a step of the grid (√2)",
            spread <= ALLOWED,
            f"2^{spread:.2f} over {_span(sweeps)}; {PLAIN[way]}: 2^{_spread(plain):.2f}",
        )
        worse = _worse(sweeps)
        yield Claim(
            f"{way}, {rule}: at equal learning rate a larger model is never worse",
            worse <= SLACK,
            f"at most {worse:+.3f} bits/byte; {PLAIN[way]}: {_worse(plain):+.3f}",
        )


def _spread(sweeps: Sequence[Result]) -> float:
    best = [optimum(losses(r)) for r in sweeps]
    return max(best) - min(best)


def _span(sweeps: Sequence[Result]) -> str:
    return f"{WORDS[sweeps[0]['way']]} {sweeps[0]['size']} to {sweeps[-1]['size']}"


def _worse(sweeps: Sequence[Result]) -> float:
    """By how much a model is worse than a smaller one at the same learning rate, at most."""
    found = [
        losses(b)[i] - losses(a)[i]
        for a, b in itertools.pairwise(sweeps)
        for i in losses(a)
        if i in losses(b) and math.isfinite(losses(a)[i])
    ]
    return max(found, default=0.0)
