"""Runs a jaxpr with what some of its equations return multiplied by numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uscale_jax import _factors
from uscale_jax._jax import ClosedJaxpr, JaxprEqn
from uscale_jax.trace.tapped import Runner, Taken


def run(closed: ClosedJaxpr, factors: Mapping[int, float], args: Sequence[Any]) -> list[Any]:
    """Returns the outputs of a program on ``args``; ``factors`` are by visit.

    Calls that hold such an equation are entered: they are not rematerialised, and derivatives are
    those of what they compute.
    """
    return _Multiplied(factors).closed(closed, args, 0)[0]


class _Multiplied(Runner):
    """Takes nothing, and goes where taps would be."""

    def __init__(self, factors: Mapping[int, float]) -> None:
        super().__init__(dict.fromkeys(factors, lambda values: ()), {}, frozenset())
        self.factors = factors

    def _equation(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        outs, taken = super()._equation(eqn, values, base)
        if base in self.factors:
            outs = [_factors.multiply(out, self.factors[base]) for out in outs]
        return outs, taken
