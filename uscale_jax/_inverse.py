"""A plan read backwards: how the small model is trained in the frame of the big one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from uscale_jax._places import is_absent, prefixes
from uscale_jax._plan import Indices, LeafPlan, Plan, Term
from uscale_jax._types import Key


def inverse(plan: Plan) -> Plan:
    """Returns the plan from the big model to the small one, of a first copy of every unit.

    Factors and numbers of copies are those of the first copies, upside down; so are learning
    rates.  It is for frames alone: nothing can be grown by it.
    """
    leaves = {leaf.source: _leaf(leaf) for leaf in plan.leaves.values() if not leaf.new}
    ordered = [leaves[key] for key in plan.small_keys]
    return replace(
        plan,
        leaves={leaf.name: leaf for leaf in ordered},
        treedef=plan.small_treedef,
        small_treedef=plan.treedef,
        small_keys=tuple(leaf.key for leaf in plan.leaves.values()),
        models=None,
    )


def _leaf(leaf: LeafPlan) -> LeafPlan:
    maps = leaf.maps_of(new_layers=False)
    first = tuple(
        None if old is None else _first(old, n) for old, n in zip(maps, leaf.small, strict=True)
    )
    rates = leaf.factors if leaf.rates is None else leaf.rates
    return replace(
        leaf,
        key=leaf.source,
        source=leaf.key,
        small=leaf.big,
        big=leaf.small,
        maps=first,
        averages=(),
        factors=_inverted(leaf.factors, first),
        copies=_inverted(leaf.copies, first),
        rates=_inverted(rates, first),
        partners=(),
        layer_dim=None,
        layers=(),
    )


def _first(old: Indices, size: int) -> Indices:
    """The first place of every unit."""
    found = np.zeros(size, np.int64)
    there = np.flatnonzero(old >= 0)[::-1]
    found[old[there]] = there
    return found


def _inverted(terms: Sequence[Term], first: Sequence[Indices | None]) -> tuple[Term, ...]:
    found = []
    for term in terms:
        kept = np.asarray(term, np.float64)
        for dim, places in enumerate(first if kept.ndim else ()):
            if places is not None and kept.shape[dim] > 1:
                kept = np.take(kept, places, axis=dim)
        found.append(1 / kept)
    return tuple(found)


def is_of_small(plan: Plan, keys: Sequence[Key], leaves: Sequence[Any]) -> bool:
    """Returns whether leaves are those of the small model, or of a part of it, not the big's."""
    big = {leaf.key: leaf.big for leaf in plan.leaves.values()}
    small = {leaf.source: leaf.small for leaf in plan.leaves.values()}
    return not _fits(big, keys, leaves) and _fits(small, keys, leaves)


def _fits(table: dict[Key, tuple[int, ...]], keys: Sequence[Key], leaves: Sequence[Any]) -> bool:
    given = [(key, leaf) for key, leaf in zip(keys, leaves, strict=True) if not is_absent(leaf)]
    return any(
        all(
            (*prefix, *key) in table
            and tuple(getattr(leaf, "shape", table[*prefix, *key])) == table[*prefix, *key]
            for key, leaf in given
        )
        for prefix in prefixes(table)
    )
