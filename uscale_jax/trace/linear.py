"""Linear equations in exact arithmetic: a solution near a wish, or the few that clash."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from fractions import Fraction
from typing import TypeAlias

import numpy as np

from uscale_jax.trace.affine import Expr, Number, Symbol, plus, scaled, to_float, unknowns

Rows: TypeAlias = "dict[int, Expr]"
"""Pivot to the expression that it equals, which may hold pivots of later rows."""


class Clash(Exception):
    """Equations contradict each other; ``members`` are the places of a minimal set that does."""

    def __init__(self, members: Sequence[int]) -> None:
        """Say which equations clash."""
        super().__init__("equations clash")
        self.members = tuple(members)


def eliminate(equations: Sequence[Expr], prefer: Sequence[Collection[int]] = ()) -> Rows:
    """Solves ``equation = 0`` for one unknown each.

    Unknowns of the first collection in ``prefer`` are solved for wherever they occur, then those
    of the second; among the others the one that occurs least, which keeps rows short.

    Raises:
      Clash: no solution.
    """
    rank = {u: place for place, group in reversed([*enumerate(prefer)]) for u in group}
    uses = Counter(u for equation in equations for u in unknowns(equation))
    rows: Rows = {}
    for equation in equations:
        reduced = substitute(equation, rows)
        free = unknowns(reduced)
        if free:
            pivot = min(free, key=lambda u: (rank.get(u, len(prefer)), uses[u], -u))
            rows[pivot] = _solved_for(pivot, reduced)
        elif reduced:
            raise Clash(_certificate(equations))
    return rows


def assume(equations: Sequence[Expr], rows: Rows) -> dict[int, Expr]:
    """Adds equations to ``rows``; returns those that contradict it, with what is left of them."""
    failing: dict[int, Expr] = {}
    for place, equation in enumerate(equations):
        reduced = substitute(equation, rows)
        free = unknowns(reduced)
        if free:
            rows[free[0]] = _solved_for(free[0], reduced)
        elif reduced:
            failing[place] = reduced
    return failing


def _solved_for(pivot: int, equation: Expr) -> Expr:
    coefficient = equation[pivot]
    rest = {symbol: number for symbol, number in equation.items() if symbol != pivot}
    return scaled(rest, _exact(-1, coefficient))


def _exact(a: Number, b: Number) -> Number:
    quotient = Fraction(a) / Fraction(b)
    return int(quotient) if quotient.denominator == 1 else quotient


def substitute(equation: Expr, rows: Rows) -> Expr:
    """Returns an equation without pivots."""
    pivots = [u for u in unknowns(equation) if u in rows]
    while pivots:
        for pivot in pivots:
            number = equation.get(pivot, 0)  # an earlier pivot may have cancelled it
            equation = plus(equation, {pivot: 1, **scaled(rows[pivot], -1)}, -number)
        pivots = [u for u in unknowns(equation) if u in rows]
    return equation


def _certificate(equations: Sequence[Expr]) -> list[int]:
    """Returns a minimal set of clashing equations.

    Every reduced row remembers which equations it combines.  The rows kept are independent, so
    the combination that gives 0 = c is the only one, and no equation of it can be spared.
    """
    rows: Rows = {}
    for place, equation in enumerate(equations):
        mark: Expr = {f"#{place}": 1}
        reduced = substitute(plus(equation, mark), rows)
        free = unknowns(reduced)
        if free:
            rows[free[0]] = _solved_for(free[0], reduced)
        elif any(not str(symbol).startswith("#") for symbol in reduced):
            return sorted(int(str(s)[1:]) for s in reduced if str(s).startswith("#"))
    raise AssertionError("equations that clash do so in any order")


def values(rows: Rows, wishes: Mapping[int, Expr], count: int) -> list[Expr]:
    """Returns every unknown where those that are not pivots are as wished for."""
    found: dict[int, Expr] = {}
    for u in range(count):
        reduced = substitute({u: 1}, rows)
        total: Expr = {s: n for s, n in reduced.items() if not isinstance(s, int)}
        for free in unknowns(reduced):
            total = plus(total, wishes.get(free, {}), reduced[free])
        found[u] = total
    return [found[u] for u in range(count)]


def nearest(
    equations: Sequence[Expr],
    wishes: Mapping[int, Expr],
    weights: Sequence[float],
) -> list[Expr]:
    """Returns the solution that departs from ``wishes`` least: weighted, in few unknowns.

    Unknowns of weight 0 are auxiliary.  Where the wishes are no solution, linear programming
    finds which unknowns depart (the sum of weighted distances prefers few), and exact elimination
    finds how far.

    Raises:
      Clash: no solution.
    """
    auxiliary = [u for u, weight in enumerate(weights) if weight == 0]
    found = values(eliminate(equations, [auxiliary]), wishes, len(weights))
    if all(found[u] == wishes.get(u, {}) for u in range(len(weights)) if weights[u]):
        return found
    departing = _departing(equations, wishes, weights)
    return values(eliminate(equations, [departing, auxiliary]), wishes, len(weights))


def _departing(
    equations: Sequence[Expr], wishes: Mapping[int, Expr], weights: Sequence[float]
) -> list[int]:
    """Returns the unknowns that are not as wished for where the weighted distance is smallest."""
    from scipy.optimize import linprog  # type: ignore[import-untyped]
    from scipy.sparse import coo_array  # type: ignore[import-untyped]

    count = len(weights)
    entries: list[tuple[int, int, float]] = []
    right = np.zeros(len(equations))
    for row, equation in enumerate(equations):
        known: Expr = {s: n for s, n in equation.items() if not isinstance(s, int)}
        for u in unknowns(equation):
            entries.append((row, u, float(equation[u])))
            known = plus(known, wishes.get(u, {}), equation[u])
        right[row] = -to_float(known)
    rows, columns, numbers = (np.array(column) for column in zip(*entries, strict=True))
    both = coo_array(
        (
            np.concatenate([numbers, -numbers]),
            (np.concatenate([rows, rows]), np.concatenate([columns, columns + count])),
        ),
        shape=(len(equations), 2 * count),
    )
    cost = np.concatenate([weights, weights])
    result = linprog(cost, A_eq=both.tocsr(), b_eq=right, bounds=(0, None), method="highs")
    if result.x is None:
        return []
    distance = result.x[:count] - result.x[count:]
    return [u for u in range(count) if weights[u] and abs(distance[u]) > 1e-6]


def null_space(equations: Sequence[Expr], count: int) -> list[dict[int, Number]]:
    """Returns a basis of the solutions of the equations without their known parts."""
    homogeneous: list[Expr] = [
        {s: n for s, n in e.items() if isinstance(s, int)} for e in equations
    ]
    rows = eliminate(homogeneous)
    solved = {u: substitute({u: 1}, rows) for u in range(count)}
    basis: dict[Symbol, dict[int, Number]] = {u: {} for u in range(count) if u not in rows}
    for u, expr in solved.items():
        for free, number in expr.items():
            basis[free][u] = number
    return list(basis.values())


def sparser(vectors: Sequence[Mapping[int, Number]]) -> list[dict[int, Number]]:
    """Returns vectors of the same span, some replaced by sums with others that are shorter."""
    basis = [dict(vector) for vector in vectors]
    holders: dict[int, set[int]] = {}
    for i, vector in enumerate(basis):
        for u in vector:
            holders.setdefault(u, set()).add(i)
    todo = list(range(len(basis)))
    while todo:
        i = todo.pop()
        shorter = _shorter(basis, i, {j for u in basis[i] for j in holders[u]} - {i})
        if shorter is not None:
            for u in basis[i].keys() | shorter.keys():
                (holders[u].add if u in shorter else holders[u].discard)(i)
            basis[i] = shorter
            todo.append(i)
    return basis


def _shorter(
    basis: Sequence[dict[int, Number]], i: int, others: Collection[int]
) -> dict[int, Number] | None:
    """The shortest combination of vector ``i`` with another, if shorter than itself."""
    best = None
    for j in sorted(others):
        for u in basis[i].keys() & basis[j].keys():
            times = _exact(-basis[i][u], basis[j][u])
            total = _sum(basis[i], basis[j], times)
            if len(total) < len(best if best is not None else basis[i]):
                best = total
    return best


def _sum(a: Mapping[int, Number], b: Mapping[int, Number], times: Number) -> dict[int, Number]:
    keys = [*a, *(u for u in b if u not in a)]
    return {u: n for u in keys if (n := a.get(u, 0) + times * b.get(u, 0))}
