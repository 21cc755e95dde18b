"""Ways to tell copies of a unit apart that leave the function as it is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax._plan import Indices, LeafPlan

AMOUNTS = {"noise": 1.0, "uneven": 1 / 3, "zero_fan_out": 1.0, "paired": 1.0}
"""The ways, and how much of it where nothing is said."""


class Group(NamedTuple):
    """Places along a dimension by the unit they are copies of."""

    old: Any
    """The unit of every place."""
    rank: Any
    """Which of the copies it is, from 0."""
    count: Any
    """How many copies there are."""
    partner: Any
    """-1 for first copies, the first place of its pair for one that has a partner, else -2."""


class Dimensions(NamedTuple):
    """The dimensions of a leaf along which copies are to differ."""

    readers: Mapping[int, Group]
    makers: Mapping[int, Group]


def dimensions(leaf: LeafPlan, kind: str) -> Dimensions:
    """Returns along which dimensions a leaf reads or makes units that are to differ."""
    if not leaf.floating or leaf.zero:
        return Dimensions({}, {})
    if kind in ("noise", "uneven"):
        return Dimensions(_groups(leaf, ("reader", "switch")), {})
    makers = _groups(leaf, ("unit",)) if len(leaf.big) > 1 else {}
    return Dimensions(_groups(leaf, ("switch",)), makers)


def _groups(leaf: LeafPlan, roles: Sequence[str]) -> dict[int, Group]:
    pairs = zip(leaf.maps, leaf.roles, strict=True)
    found = {
        i: group_of(old, leaf.partners[i])
        for i, (old, role) in enumerate(pairs)
        if old is not None and role in roles and old.min(initial=0) >= 0
    }
    return {i: group for i, group in found.items() if group.rank.any()}


def group_of(old: Indices, partner: Indices | None) -> Group:
    """Returns places by the unit they are copies of."""
    order = np.argsort(old, kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(old)) - np.searchsorted(old[order], old[order])
    alone = np.where(rank == 0, -1, -2)
    return Group(old, rank, np.bincount(old)[old], alone if partner is None else partner)


def apply(kind: str, x: jax.Array, which: Dimensions, amount: Any, key: jax.Array) -> jax.Array:
    """Returns a grown leaf whose copies differ, in the dtype it is computed in."""
    if kind == "uneven":
        for axis, group in which.readers.items():
            x = _uneven(x, axis, group, amount)
        return x
    rms = jnp.sqrt(jnp.mean(jnp.square(jnp.abs(x))))
    noise = amount * rms * jax.random.normal(key, x.shape, x.dtype)
    if kind == "noise":
        return x + _zero_sum(noise, which.readers)
    for axis, group in which.makers.items():
        x = jnp.where(_along(group.rank > 0, x, axis), noise, x)
    for axis, group in which.readers.items():
        total = x * _along(group.count.astype(x.real.dtype), x, axis)
        x = jnp.where(_along(group.rank == 0, x, axis), total, 0)
    return _paired(x, noise, which) if kind == "paired" else x


def _paired(x: jax.Array, noise: jax.Array, which: Dimensions) -> jax.Array:
    """The two units of a pair are made alike, and their readers sum to 0."""
    for axis, group in which.makers.items():
        mates = _along(group.partner >= 0, x, axis) & _all_first(x, which, axis)
        x = jnp.where(mates, jnp.take(noise, jnp.maximum(group.partner, 0), axis), x)
    for axis, group in which.readers.items():
        mates = _along(group.partner >= 0, x, axis) & _all_first(x, which, axis)
        places = jnp.arange(x.shape[axis])
        sign = _along(jnp.where(group.partner == places, 1, -1).astype(x.dtype), x, axis)
        x = jnp.where(mates, sign * jnp.take(noise, jnp.maximum(group.partner, 0), axis), x)
    return x


def _all_first(x: jax.Array, which: Dimensions, but: int) -> jax.Array:
    """Where a place is a first copy along every dimension but one."""
    first = jnp.ones((1,) * x.ndim, bool)
    for axis, group in (*which.makers.items(), *which.readers.items()):
        if axis != but:
            first = first & _along(group.rank == 0, x, axis)
    return first


def _along(vector: jax.Array, x: jax.Array, axis: int) -> jax.Array:
    return vector.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _zero_sum(noise: jax.Array, readers: Mapping[int, Group]) -> jax.Array:
    """Takes off the mean over all copies of every element."""
    mean = noise
    for axis, group in readers.items():
        moved = jnp.moveaxis(mean, axis, 0)
        total = jax.ops.segment_sum(moved, group.old, num_segments=len(group.old))[group.old]
        count = group.count.astype(noise.real.dtype)
        mean = jnp.moveaxis(total, 0, axis) / _along(count, noise, axis)
    return noise - mean


def _uneven(x: jax.Array, axis: int, group: Group, amount: Any) -> jax.Array:
    """The first copy gets a share of ``amount``, the others the rest in equal parts."""
    count = group.count.astype(x.real.dtype)
    others = (1 - amount) / jnp.maximum(count - 1, 1)
    share = jnp.where(group.rank == 0, amount, others)
    return x * _along(jnp.where(count > 1, count * share, 1).astype(x.dtype), x, axis)
