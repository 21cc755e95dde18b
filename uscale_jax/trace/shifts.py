"""Parameters that are read as ``c + leaf`` only, such as the gain ``1 + w`` of a norm.

A factor on the leaf would do nothing good; one on the sum would.  Where a leaf is read in no other
way, the sum is what factors are about: the leaf becomes ``f·(c + w) − c``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from uscale_jax.trace.combine import LAYOUT
from uscale_jax.trace.equations import same_number
from uscale_jax.trace.program import Equation, Program, Value


class Shifts(NamedTuple):
    """Constants that are added to parameters before anything else is done with them."""

    by_leaf: dict[int, float]
    """By the place of the leaf."""
    equations: frozenset[int]
    """Ids of the equations that add them."""


def find(program: Program, leaves: int) -> Shifts:
    """Returns the shifts of the first ``leaves`` inputs of a program."""
    uses: dict[int, list[Equation]] = {}
    for eqn in program.equations:
        for value in eqn.inputs:
            uses.setdefault(id(value), []).append(eqn)
    outputs = frozenset(map(id, program.outputs))
    by_leaf, equations = {}, set()
    for place, leaf in enumerate(program.inputs[:leaves]):
        found = _additions(leaf, uses, outputs) if leaf.scales else None
        constants = {shift for _, shift in found or ()}
        if found and len(constants) == 1:
            by_leaf[place] = constants.pop()
            equations |= {id(eqn) for eqn, _ in found}
    return Shifts(by_leaf, frozenset(equations))


def _additions(
    value: Value, uses: dict[int, list[Equation]], outputs: frozenset[int]
) -> list[tuple[Equation, float]] | None:
    """The equations that add a constant to a value, if it is used in no other way."""
    found: list[tuple[Equation, float]] = []
    todo = [value]
    while todo:
        value = todo.pop()
        if id(value) in outputs:
            return None
        for eqn in uses.get(id(value), ()):
            if eqn.name in LAYOUT and eqn.inputs[0] is value:
                todo += eqn.outputs
            elif (shift := _shift(eqn, value)) is not None:
                found.append((eqn, shift))
            else:
                return None
    return found


def _shift(eqn: Equation, value: Value) -> float | None:
    """The c of ``c + value``, ``value - (-c)`` or ``-c - value``, a finite number, not 0."""
    if eqn.name not in ("add", "add_any", "sub") or eqn.inputs.count(value) != 1:
        return None
    other = eqn.inputs[1 - eqn.inputs.index(value)].uniform
    if other is None or not _is_shift(other):
        return None
    return float(other[0]) if eqn.name != "sub" else -float(other[0])


def _is_shift(constant: Sequence[Any]) -> bool:
    small, big = constant[0], constant[-1]
    real = isinstance(small, float | np.floating | int | np.integer)
    return real and same_number(small, big) and bool(np.isfinite(small)) and small != 0
