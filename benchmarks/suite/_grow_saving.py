"""FLOPs saved at equal loss, read off curves of held-out loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

SMOOTHING = 3


class Line(NamedTuple):
    """Held-out bits against FLOPs, in order."""

    flops: tuple[float, ...]
    bits: tuple[float, ...]

    @property
    def final(self) -> float:
        """Return the last value."""
        return self.bits[-1]


def line(flops: Sequence[float], bits: Sequence[float | None]) -> Line:
    """Return a curve smoothed: every value the mean of itself and the two before it.

    A value that is not finite counts as infinite, so that it reaches no loss.
    """
    values = [float("inf") if bit is None else bit for bit in bits]
    windows = [values[max(0, i + 1 - SMOOTHING) : i + 1] for i in range(len(values))]
    return Line(tuple(flops), tuple(sum(window) / len(window) for window in windows))


def reached(curve: Line, level: float) -> float | None:
    """Return the FLOPs at which the curve first comes down to ``level``; None if never.

    Between two evaluations the line through both counts; nothing is extrapolated.
    """
    before: tuple[float, float] | None = None
    for now in zip(curve.flops, curve.bits, strict=True):
        if now[1] <= level:
            return now[0] if before is None else _crossing(before, now, level)
        before = now
    return None


def _crossing(before: tuple[float, float], now: tuple[float, float], level: float) -> float:
    if before[1] == float("inf"):
        return now[0]
    share = (before[1] - level) / (before[1] - now[1])
    return before[0] + share * (now[0] - before[0])


def saved(scratch: Line, other: Line) -> float | None:
    """Return 1 − F/F_scratch at the loss that training from scratch ends with; None if not reached.

    F_scratch is where the smoothed curve from scratch first is as low as at its end.
    """
    level = scratch.final
    whole, own = reached(scratch, level), reached(other, level)
    return None if own is None or whole is None else 1 - own / whole
