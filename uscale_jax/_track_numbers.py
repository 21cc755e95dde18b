"""What is kept of a tensor: its size, and how its numbers lie in a format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from uscale_jax import _factors, _jax
from uscale_jax.numerics._formats import Format

_FIELDS = ("count", "nonzero", "low", "middle", "high", "max", "under", "over")
_MAX = _FIELDS.index("max")
FIELDS = len(_FIELDS)

# Squares are summed in three classes, so that none over- or underflows (Blue's algorithm).
_LARGE, _SHIFT = 2.0**30, 2.0**76


class Sizes(NamedTuple):
    """How large the numbers of a tensor are: scalars, arrays while tracing."""

    rms: Any
    """Root mean square; NaN or infinite if a number is."""
    max: Any
    """The largest absolute value."""
    underflow: Any
    """The fraction of the numbers that are not 0 which the format rounds to 0."""
    overflow: Any
    """The fraction of all numbers that is larger than the format's largest one; NaN is neither."""
    zeros: Any
    """The fraction of all numbers that is 0 as it is."""


@partial(jax.jit, static_argnums=1)
def measured(x: jax.Array, fmt: Format) -> jax.Array:
    """Returns what is kept of a tensor, (FIELDS,): counts, sums of squares, the largest number."""
    wide = _factors.compute_dtype(jnp.finfo(x.dtype).dtype)
    size = jnp.abs(x if jnp.iscomplexobj(x) else x.astype(wide)).astype(wide)
    large, small, nonzero = size > _LARGE, size < 1 / _LARGE, size != 0
    near = jnp.where(large, 1 / _SHIFT, jnp.where(small, _SHIFT, 1.0)).astype(wide)
    square, none = jnp.square(size * near), jnp.zeros_like(size)
    squares = [jnp.where(where, square, none) for where in (small, ~(large | small), large)]
    counted = [nonzero, nonzero & (size <= fmt.smallest_subnormal / 2), size > fmt.max]
    *sums, largest, filled, under, over = _reduced(
        (*squares, size, *(where.astype(jnp.int32) for where in counted))
    )
    found = (jnp.asarray(size.size, wide), filled, *sums, largest, under, over)
    return jnp.stack([each.astype(jnp.result_type(float)) for each in found])


def _reduced(parts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """Sums, and of the fourth part the largest, in one pass: rows first, which run in parallel."""

    def both(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        pairs = enumerate(zip(a, b, strict=True))
        return (*(jnp.maximum(x, y) if i == 3 else x + y for i, (x, y) in pairs),)

    zeros = (*(jnp.zeros((), part.dtype) for part in parts),)
    ndim = parts[0].ndim
    for dims in ((ndim - 1,), (*range(ndim - 1),)) if ndim else ():
        parts = (*jax.lax.reduce(parts, zeros, both, dims),) if dims else parts
    return parts


def merged(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns what is kept of two tensors together."""
    return (a + b).at[..., _MAX].set(jnp.maximum(a[..., _MAX], b[..., _MAX]))


def together(kept: jax.Array) -> jax.Array:
    """Returns what is kept of many tensors together: (..., FIELDS) to (FIELDS,)."""
    rows = kept.reshape(-1, FIELDS)
    return rows.sum(0).at[_MAX].set(rows[:, _MAX].max())


def sizes(kept: jax.Array) -> Sizes:
    """Returns sizes from what is kept, over all but the last dimension."""
    count, nonzero, low, middle, high, largest, under, over = jnp.moveaxis(kept, -1, 0)
    parts = jnp.stack([jnp.sqrt(low) / _SHIFT, jnp.sqrt(middle), jnp.sqrt(high) * _SHIFT])
    # The root of a sum of squares, without squaring what the classes were made to avoid.
    top = jnp.max(parts, axis=0)
    safe = jnp.where((top > 0) & jnp.isfinite(top), top, jnp.ones_like(top))
    root = safe * jnp.sqrt(jnp.square(parts / safe[None]).sum(0))
    ratio = lambda n, of: n / jnp.where(of > 0, of, jnp.full_like(of, jnp.nan))  # noqa: E731
    of_nonzero = jnp.where(nonzero > 0, under / jnp.maximum(nonzero, 1), jnp.zeros_like(under))
    rms = root / jnp.sqrt(jnp.where(count > 0, count, jnp.full_like(count, jnp.nan)))
    return Sizes(
        rms,
        largest,
        jnp.where(count > 0, of_nonzero, count * jnp.nan),
        ratio(over, count),
        ratio(count - nonzero, count),
    )


def tapped(x: jax.Array, slot: jax.Array, fmt: Format) -> jax.Array:
    """Returns ``x``; the gradient of ``slot``, (FIELDS,), is what is kept of the gradient of it."""
    return _tapped(fmt, (*sorted(_jax.varying(slot)),), x, slot)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _tapped(fmt: Format, axes: tuple[str, ...], x: jax.Array, slot: jax.Array) -> jax.Array:
    del fmt, axes, slot
    return x


def _forward(
    fmt: Format, axes: tuple[str, ...], x: jax.Array, slot: jax.Array
) -> tuple[jax.Array, None]:
    return x, None


def _backward(
    fmt: Format, axes: tuple[str, ...], _: None, g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    return g, _jax.spread(measured(g, fmt), axes)


_tapped.defvjp(_forward, _backward)
