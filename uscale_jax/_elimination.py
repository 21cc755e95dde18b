"""Units one after the other, those that the others can best make up for first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"

RIDGE = 1e-6
"""Of the mean square of what is read, what is added to all squares."""
ROUNDS = 6
"""In how many steps units go; what is left is solved for anew after each."""


class Readers:
    """What a product reads with, and what it loses when places go and the others make up for it.

    With C the gram of what is read and W what reads it, least squares on the places that are left
    lose :math:`\\mathrm{tr}\\,W_B^T (C^{-1}_{BB})^{-1} W_B` more for a block B of places.
    """

    def __init__(self, gram: Array, weight: Array, units: Array) -> None:
        """Start with all places: gram (places, places), weight (places, columns), their units."""
        ridge = RIDGE * np.trace(gram) / len(gram) or 1.0  # nothing was read: nothing is lost
        self.gram, self.weight, self.units = gram + ridge * np.eye(len(gram)), weight, units
        self.energy = float(np.sum(weight * (self.gram @ weight))) or 1.0
        self.places = np.arange(len(gram))
        self._solve()

    def _solve(self) -> None:
        self.inverse = np.linalg.inv(self.gram[np.ix_(self.places, self.places)])
        self.current = self.inverse @ (self.gram[self.places] @ self.weight)

    def costs(self, count: int) -> Array:
        """Returns what is lost with each of ``count`` units alone, as a share of all there is."""
        own, costs = self.units[self.places], np.zeros(count)
        if len(np.unique(own)) == len(own):
            inside = own >= 0
            squares = np.sum(np.square(self.current), 1) / np.diag(self.inverse)
            costs[own[inside]] = squares[inside]
            return costs / self.energy
        for unit in np.unique(own[own >= 0]):
            at = np.flatnonzero(own == unit)
            block = self.inverse[np.ix_(at, at)]
            costs[unit] = np.sum(self.current[at] * np.linalg.solve(block, self.current[at]))
        return costs / self.energy

    def remove(self, units: Array) -> None:
        """Drops the places of units."""
        self.places = self.places[~np.isin(self.units[self.places], units)]
        self._solve()


class Merging:
    """The same where what a unit does is taken over by the one that is most like it, alone.

    With C the gram of what is read, place i is ``C_ij/C_jj`` times place j as nearly as can be, and
    :math:`(C_{ii} - C_{ij}^2/C_{jj}) \\lVert W_i \\rVert^2` is lost.  Units of several places merge
    place by place.
    """

    def __init__(self, gram: Array, weight: Array, units: Array) -> None:
        """Start with all units: gram (places, places), weight (places, columns), their units."""
        self.left = np.unique(units[units >= 0])
        self.places = places_of(units, self.left)
        squares = np.sum(np.square(weight), 1)
        self.losses = sum(similar(gram, row)[0] * squares[row][:, None] for row in self.places.T)
        self.energy = float(np.sum(weight * (gram @ weight))) or 1.0

    def costs(self, count: int) -> Array:
        """Returns what is lost with each of ``count`` units alone, as a share of all there is."""
        costs = np.zeros(count)
        costs[self.left] = np.min(self.losses, 1, initial=np.inf) / self.energy
        return costs

    def remove(self, units: Array) -> None:
        """Drops units."""
        stays = ~np.isin(self.left, units)
        self.left, self.losses = self.left[stays], self.losses[np.ix_(stays, stays)]


def places_of(units: Array, which: Array) -> Array:
    """Returns the places of units, a row each, in order; of several equal ones those of one."""
    order = np.argsort(units, kind="stable")
    rows = [order[units[order] == unit] for unit in which]
    return np.stack([row[: min(map(len, rows))] for row in rows])


def similar(gram: Array, places: Array) -> tuple[Array, Array]:
    """Returns what is lost of each place as a multiple of each other one, and that multiple."""
    inner = gram[np.ix_(places, places)]
    squares = np.diag(inner)
    shares = inner / np.where(squares > 0, squares, np.inf)
    losses = np.maximum(squares[:, None] - inner * shares, 0)
    np.fill_diagonal(losses, np.inf)
    return losses, shares


def eliminated(readers: Sequence[Readers | Merging], size: int, keep: int) -> Array:
    """Returns scores of ``size`` units: what is lost with each when its turn comes.

    Those that cost least go first, a share in every round; who goes later scores no lower.
    """
    scores, left, floor = np.zeros(size), np.arange(size), 0.0
    for turn in range(ROUNDS, -1, -1):
        costs = np.sum([each.costs(size) for each in readers], axis=0)[left]
        order = np.argsort(costs, kind="stable")
        scores[left] = np.maximum(costs, floor)
        gone, going = left[order], -(-(len(left) - keep) // turn) if turn else 0
        floor = float(scores[gone[:going]].max(initial=floor))
        left = np.sort(gone[going:])
        for each in readers if going else ():
            each.remove(gone[:going])
    scores[left] = np.maximum(scores[left], floor * (1 + 1e-9))
    return scores
