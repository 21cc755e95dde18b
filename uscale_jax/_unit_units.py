"""The unit of every value of a program, and of its gradient: what it was measured to be."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from uscale_jax._track_numbers import Sizes
from uscale_jax._track_report import Scales

_EXPONENTS = 60.0
"""Units are from 2^-60 to 2^60, so that ratios of a few of them are numbers of float32."""
_SENTINEL = 2.0**20
"""By how much what is joined to values, a mask's -1e9 say, is larger than these to be no size."""


class Unit(NamedTuple):
    """A value is ``size`` times what is held of it."""

    size: float = 1.0
    """s of x = s·x'."""
    slope: float | None = None
    """ρ of ∂L/∂x' = ρ·g', with g' what flows back; None of what has no gradient."""
    wild: bool = False
    """Whether numbers that are no sizes, such as a mask's, are among it."""


class Units:
    """Units by visit and place, measured where that tells something."""

    def __init__(self, scales: Scales, rounded: bool) -> None:
        """Look at what was tracked."""
        self.rounded = rounded
        values, gradients = jax.device_get((scales.values, scales.gradients))
        places = {row.name: (row.visit, row.place) for row in scales.tracked}
        self.sizes: Mapping[Any, Sizes] = {places[name]: each for name, each in values.items()}
        self.slopes = {places[name]: float(each.rms) for name, each in gradients.items()}
        usual = [slope for slope in self.slopes.values() if _tells(slope)]
        # What has no gradient yet, behind weights that start at zero, will have one.
        self.usual = statistics.median(usual) if usual else 1.0

    def of(self, at: tuple[int, int], natural: Unit, joined: bool = False) -> Unit:
        """Return the unit of a result whose operands and operation give it the unit ``natural``,
        with a slope if they have one.

        ``joined`` says that constants were joined to it, or what had them already.
        """
        if at not in self.sizes:
            return natural
        size, largest = float(self.sizes[at].rms), float(self.sizes[at].max)
        if joined and not largest <= _SENTINEL * natural.size:
            return Unit(natural.size, self._slope(at, natural, natural.size), wild=True)
        size = self._rounded(size) if _tells(size) else natural.size
        return Unit(size, self._slope(at, natural, size))

    def _slope(self, at: tuple[int, int], natural: Unit, size: float) -> float | None:
        if natural.slope is None:
            return None
        slope = self.slopes.get(at, 0.0)
        return self._rounded(size * (slope if _tells(slope) else self.usual))

    def _rounded(self, number: float) -> float:
        exponent = min(max(math.log2(number), -_EXPONENTS), _EXPONENTS)
        return 2.0 ** (round(exponent) if self.rounded else exponent)


def _tells(number: float) -> bool:
    return bool(np.isfinite(number)) and number > 0


def largest(units: Sequence[Unit]) -> Unit:
    """Returns the natural unit of a sum: that of the largest of what has gradients, if any has."""
    own = [unit for unit in units if unit.slope is not None] or [*units]
    return max(own, key=lambda unit: unit.size)
