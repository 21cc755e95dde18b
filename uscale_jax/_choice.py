"""Which units stay, given what each is worth, which are equal, and which nothing reads."""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np

Array: TypeAlias = "np.ndarray[Any, Any]"


def chosen(scores: Array, classes: Array, dead: Array, count: int) -> Array:
    """Returns which of the ``count`` units of the small model every unit becomes, -1 for none.

    Equal units are one unit with what they are worth together, and dead ones go first.  Where
    there are more to keep than differ, classes are kept in as many parts as are left for them.
    """
    worth = np.bincount(classes, weights=np.where(dead, 0.0, scores))
    alive = np.bincount(classes, weights=~dead) > 0
    order = np.lexsort((-worth, ~alive))
    found = np.full(len(scores), -1, np.int64)
    if count <= len(worth):
        for number, which in enumerate(np.sort(order[:count])):
            found[classes == which] = number
        return found
    number = 0
    for which, parts in enumerate(_parts(np.bincount(classes), count)):
        members = np.flatnonzero(classes == which)
        found[members] = number + np.arange(len(members)) * parts // len(members)
        number += parts
    first = np.unique(found, return_index=True)[1]
    return np.argsort(np.argsort(first))[found]


def _parts(sizes: Array, count: int) -> Array:
    """In how many parts classes are kept: one each, and more where most units would share one."""
    parts = np.ones(len(sizes), np.int64)
    for _ in range(count - len(sizes)):
        parts[np.argmax(np.where(parts < sizes, sizes / parts, 0))] += 1
    return parts


def first_members(units: Array) -> Array:
    """Returns for every unit of the small model the first of those that become it."""
    _, first = np.unique(units[units >= 0], return_index=True)
    return np.flatnonzero(units >= 0)[first]
