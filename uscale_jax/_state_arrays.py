"""How arrays in the state of an optimizer are made: compiled programs, one for equal shapes."""

from __future__ import annotations

from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _grow, _jax
from uscale_jax._powers import Terms, times
from uscale_jax._shrink import sum_copies
from uscale_jax._work import resized_sharding

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
    return _compiled(program, sharding or resized_sharding(x, shape), shape)(x, *args)


@cache
def _compiled(program: Any, sharding: Any, shape: tuple[int, ...]) -> Any:
    placed = partial(program, shape=shape)
    if sharding is None:
        return jax.jit(placed)
    if _jax.is_explicit(sharding.mesh):
        placed = partial(jax.sharding.auto_axes(placed, out_sharding=sharding))
    return jax.jit(placed, out_shardings=sharding)


def grown(
    x: jax.Array, maps: Any, means: Any, factors: Terms, *, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the array for the big model, by the maps of its leaf."""
    del shape  # the maps make it
    if not _factors.is_scaled(x):
        return _grow._placed(x, maps)
    wide = _grow._placed(x.astype(_factors.compute_dtype(x.dtype)), maps, means)
    return _jax.with_weak_type(times(wide, factors).astype(x.dtype), x)


def shrunk(
    x: jax.Array, copies: tuple[Copies | None, ...], factors: Terms, *, shape: tuple[int, ...]
) -> jax.Array:
    """Returns the array for the small model, the mean over copies."""
    del shape
    wide = x
    if _factors.is_scaled(x):
        wide = times(x.astype(_factors.compute_dtype(x.dtype)), factors)
    for axis, each in enumerate(copies):
        wide = wide if each is None else _mean(wide, axis, each)
    return _jax.with_weak_type(wide.astype(x.dtype), x)


def _mean(x: jax.Array, axis: int, copies: Copies) -> jax.Array:
    """The mean over copies, as the first one and the mean difference from it: equal ones stay."""
    old, first, count = copies
    start = jnp.take(x, first, axis=axis)
    if not _factors.is_scaled(x):
        return start
    size = len(first)
    apart = x - jnp.take(start, jnp.maximum(old, 0), axis=axis)
    total = sum_copies(apart, axis, old, size)
    each = count.reshape([-1 if i == axis else 1 for i in range(x.ndim)]).astype(x.real.dtype)
    return start + total / each


def zeros(x: jax.Array, *, shape: tuple[int, ...]) -> jax.Array:
    """Returns zeros like an array, of another shape."""
    return _jax.with_weak_type(jnp.zeros(shape, x.dtype), x)
