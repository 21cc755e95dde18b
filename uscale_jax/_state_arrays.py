"""How arrays in the state of an optimizer are made: compiled programs, one for equal shapes."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _grow, _jax, _parts
from uscale_jax._parts import Cut, Way
from uscale_jax._powers import Terms, times
from uscale_jax._shrink import sum_copies
from uscale_jax._work import compiled, placed, resized_sharding

Copies: TypeAlias = tuple[Any, Any, Any]
"""Along a dimension of the big leaf: the unit of every place; per unit, its first place and how
many copies there are."""


def copies_along(old: Any, size: int) -> Copies | None:
    """Returns what the mean over copies needs to know about a dimension."""
    if old is None:
        return None
    first = np.zeros(size, np.int64)
    there = np.flatnonzero(old >= 0)[::-1]
    first[old[there]] = there
    return old, first, np.bincount(old[old >= 0], minlength=size)


def run(
    x: Any,
    sharding: jax.sharding.NamedSharding | None = None,
    *,
    program: Any,
    args: tuple[Any, ...],
    shape: tuple[int, ...],
) -> Any:
    """Returns the program's result, sharded as x is where it is, or as ``sharding`` says."""
    place = sharding or resized_sharding(x, shape)
    x = placed(x, place)
    args, cuts = _by_parts(x, program, args, shape, place)
    return _compiled(program, place, shape, cuts)(x, *args)


def _by_parts(
    x: Any, program: Any, args: tuple[Any, ...], shape: tuple[int, ...], place: Any
) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The arguments with places in the parts of arrays that are cut."""
    if program is grown:
        maps, ways = _parts.to_grow(x, args[0], args[1], place)
        return (maps, *args[1:]), ways
    if program is not shrunk:
        return args, ()
    copies = args[0]
    maps = tuple(None if each is None else each[0] for each in copies)
    cuts = _parts.to_shrink(x, maps, shape, place)
    inside = [
        each if cut is None else _inside(each, size, _parts.parts(cut))
        for each, cut, size in zip(copies, cuts, shape, strict=True)
    ]
    return (tuple(inside), *args[1:]), cuts


def _inside(copies: Copies, size: int, count: int) -> Copies:
    old, first, number = copies
    return _parts.local(old, size, count), _parts.local(first, len(old), count), number


@cache
def _compiled(program: Any, sharding: Any, shape: tuple[int, ...], cuts: Any) -> Any:
    return compiled(partial(program, shape=shape, cuts=cuts), sharding)


def grown(
    x: jax.Array,
    maps: Any,
    means: Any,
    factors: Terms,
    *,
    shape: tuple[int, ...],
    cuts: tuple[Way, ...],
) -> jax.Array:
    """Returns the array for the big model, by the maps of its leaf."""
    del shape  # the maps make it
    if not _factors.is_scaled(x):
        return _grow.taken(x, maps, ways=cuts)
    wide = _grow.taken(x.astype(_factors.compute_dtype(x.dtype)), maps, means, cuts)
    return _jax.with_weak_type(times(wide, factors).astype(x.dtype), x)


def shrunk(
    x: jax.Array,
    copies: tuple[Copies | None, ...],
    factors: Terms,
    *,
    shape: tuple[int, ...],
    cuts: tuple[Cut | None, ...],
) -> jax.Array:
    """Returns the array for the small model, the mean over copies."""
    del shape
    wide = x
    if _factors.is_scaled(x):
        wide = times(x.astype(_factors.compute_dtype(x.dtype)), factors)
    for axis, (each, cut) in enumerate(zip(copies, cuts, strict=True)):
        if each is not None:
            mean = partial(_mean, axis=axis)
            wide = (
                mean(wide, *each) if cut is None else _parts.by_part(cut, axis, mean, wide, *each)
            )
    return _jax.with_weak_type(wide.astype(x.dtype), x)


def _mean(x: jax.Array, old: Any, first: Any, count: Any, *, axis: int) -> jax.Array:
    """The mean over copies, as the first one and the mean difference from it: equal ones stay."""
    start = jnp.take(x, first, axis=axis)
    if not _factors.is_scaled(x):
        return start
    size = len(first)
    apart = x - jnp.take(start, jnp.maximum(old, 0), axis=axis)
    total = sum_copies(apart, axis, old, size)
    each = count.reshape([-1 if i == axis else 1 for i in range(x.ndim)]).astype(x.real.dtype)
    return start + total / each


def zeros(x: jax.Array, *, shape: tuple[int, ...], cuts: tuple[Cut | None, ...]) -> jax.Array:
    """Returns zeros like an array, of another shape."""
    del cuts
    return _jax.with_weak_type(jnp.zeros(shape, x.dtype), x)
