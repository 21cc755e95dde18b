"""Along one axis that grows: which unit every place copies, how often, and which places are new."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.layout import Places

Term: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
"""Numbers that broadcast against a leaf."""

NEW_ZERO, NEW_MEAN, NEW_COPY = -1, -2, -3
"""A place that is no copy of a unit: it is 0, or the mean over all, or starts as one's copy."""


class Units(NamedTuple):
    """Places along an axis of the big model."""

    unit: Places
    """The unit of the small model that the place is a copy of."""
    copies: Term
    """How many copies of it there are."""
    new: Places
    """``NEW_ZERO``, ``NEW_MEAN`` or ``NEW_COPY`` where units are new, else 0."""
    rank: Places
    """Which of the copies it is, from 0."""
    mate: Places
    """The first place of its pair: copies 1 and 2, 3 and 4, ... are pairs."""
    paired: Any
    """Whether both of its pair are there."""


def units(atom: Atom, fact: Fact | None = None, *, strided: bool = False) -> Units:
    """Returns the places of an axis; with a fact about new lanes, those come last.

    Without, every unit of n that become m is repeated m/n times, some once more than others.
    Along a ``strided`` axis new lanes come behind each unit.
    """
    if strided:
        return _strided(atom, fact is not Fact.ZERO)
    small, big = atom.size[0], atom.size[-1]
    whole = big if fact is None else big // small * small
    unit = np.arange(whole) * small // max(whole, 1)
    starts = np.searchsorted(unit, unit)
    rank = np.arange(whole) - starts
    pair = (rank + 1) // 2
    counts = np.bincount(unit, minlength=small)[unit]
    mate = np.where(rank == 0, starts, starts + 2 * pair - 1)
    found = Units(unit, counts.astype(float), 0 * unit, rank, mate, counts > 2 * pair)
    # Where it does not matter, the mean is better than 0, at which nothing would be learned.
    return found if whole == big else _with_new(found, big - whole, fact is not Fact.ZERO)


def _with_new(old: Units, count: int, mean: bool) -> Units:
    """New places are copies of nothing: no partners, and not the first of any unit."""
    one = np.ones(count, np.int64)
    return Units(
        np.append(old.unit, 0 * one),
        np.append(old.copies, one),
        np.append(old.new, (NEW_MEAN if mean else NEW_ZERO) * one),
        np.append(old.rank, one),
        np.append(old.mate, 0 * one),
        np.append(old.paired, one == 0),
    )


def _strided(atom: Atom, copied: bool) -> Units:
    """One copy of every unit at every k-th place; behind it new places, as it is or 0."""
    places, step = np.arange(atom.size[-1]), atom.size[-1] // atom.size[0]
    new, unit = places % step > 0, places // step
    return Units(
        unit,
        np.ones(len(places)),
        np.where(new, NEW_COPY if copied else NEW_ZERO, 0),
        new.astype(np.int64),
        np.where(new, 0, places),
        np.zeros(len(places), bool),
    )


def of_classes(unit: Places, count: int) -> Units:
    """Returns places of which each is the unit ``unit[i]`` of ``count``, or -1: it goes."""
    gone = unit < 0
    counts = np.bincount(unit[~gone], minlength=count)
    first = np.full(count, -1, np.int64)
    there = np.flatnonzero(~gone)[::-1]
    first[unit[there]] = there
    at = np.where(gone, 0, unit)
    return Units(
        unit=at,
        copies=np.where(gone, 1, counts[at]).astype(float),
        new=np.where(gone, NEW_ZERO, 0),
        rank=(np.arange(len(unit)) != first[at]).astype(np.int64),
        mate=first[at],
        paired=np.zeros(len(unit), bool),
    )
