"""Dropout, norms and embeddings at scale one."""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax import _factors, _tree
from uscale_jax.numerics._scale import floating, scale_bwd, static


def dropout(
    x: ArrayLike,
    rate: float,
    rng: jax.Array | None = None,
    *,
    deterministic: bool = False,
    broadcast_dims: Sequence[int] = (),
) -> jax.Array:
    r"""Returns dropout at scale one: what is kept is divided by √(1 − rate), not by 1 − rate.

    .. math:: y = \frac{k\,x}{\sqrt{1 - r}}, \quad \bar x = \frac{k\,\bar y}{\sqrt{1 - r}}, \qquad
              k \in \{0, 1\}, \; \langle k \rangle = 1 - r

    The mean square stays, where ordinary dropout keeps the mean.  So evaluation is √(1 − r)·x, the
    mean of what was seen in training.

    Args:
      x: a floating array.
      rate: r, a Python number from 0 to below 1.
      rng: a random key; needed if something is dropped.
      deterministic: whether to return the mean, for evaluation.
      broadcast_dims: dimensions along which all is kept or dropped together.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is not floating, ``rate`` is traced.
      ValueError: ``rate`` is not from 0 to below 1, or positive without ``rng``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> y = un.dropout(jnp.ones(10_000), 0.75, jax.random.key(0))
      >>> print(f"{y.max():.1f} {jnp.mean(y**2):.1f}")
      2.0 1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2.
    """
    array = floating(x, "dropout's x")
    kept = 1 - _checked_rate(rate)
    if kept == 1:
        return array
    if deterministic:
        return _factors.multiply(array, kept**0.5)
    if rng is None:
        raise ValueError(
            f"dropout with rate={rate} needs a key. Fix: pass rng=jax.random.key(seed)."
        )
    held = {dim % array.ndim for dim in broadcast_dims}
    shape = [1 if dim in held else size for dim, size in enumerate(array.shape)]
    keep = jax.random.bernoulli(rng, kept, shape)
    return jnp.where(keep, _factors.multiply(array, kept**-0.5), jnp.zeros((), array.dtype))


def layer_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
) -> jax.Array:
    r"""Returns layer normalisation, at scale one, as are the gradients of its parameters.

    .. math:: y = w\,\frac{x - \langle x\rangle}{\sqrt{\operatorname{var} x + \epsilon}} + b, \qquad
              \bar w = n^{-1/2} \textstyle\sum \bar y \hat x, \quad
              \bar b = n^{-1/2} \textstyle\sum \bar y

    with n the number of vectors that are normalised.  The gradient of x is the true one.

    Args:
      x: a floating array.
      weight: w, of the shape of the dimensions in ``axis``, usually ones at first.
      bias: b, of the same shape, usually zeros at first.
      axis: the dimension, or dimensions, to normalise over.
      epsilon: ε.

    Returns:
      An array of the shape and dtype of ``x``, computed at least in float32.

    Raises:
      TypeError: ``x``, ``weight`` or ``bias`` is not floating.
      ValueError: ``axis`` is no dimension of ``x``; parameters are of another shape.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(un.layer_norm(jnp.array([1.0, 5.0, 3.0, 3.0])).round(3))
      [-1.414  1.414  0.     0.   ]

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2.
    """
    array = floating(x, "layer_norm's x")
    dims = _dims(array, axis, "layer_norm")
    wide = array.astype(_factors.compute_dtype(array.dtype))
    centred = wide - jnp.mean(wide, dims, keepdims=True)
    return _normalised(array, centred, weight, bias, dims, epsilon, "layer_norm")


def rms_norm(
    x: ArrayLike,
    weight: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-6,
) -> jax.Array:
    r"""Returns RMS normalisation, at scale one, as is the gradient of its weight.

    .. math:: y = w\,\frac{x}{\sqrt{\langle x^2\rangle + \epsilon}}, \qquad
              \bar w = n^{-1/2} \textstyle\sum \bar y \hat x

    with n the number of vectors that are normalised.  The gradient of x is the true one.

    Args:
      x: a floating array.
      weight: w, of the shape of the dimensions in ``axis``, usually ones at first.
      axis: the dimension, or dimensions, to normalise over.
      epsilon: ε.

    Returns:
      An array of the shape and dtype of ``x``, computed at least in float32.

    Raises:
      TypeError or ValueError: as :func:`layer_norm`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(un.rms_norm(jnp.array([2.0, -2.0, 0.0, 0.0])).round(3))
      [ 1.414 -1.414  0.     0.   ]

    References:
      *u-µP*, 2024 (arXiv:2407.17465).
    """
    array = floating(x, "rms_norm's x")
    dims = _dims(array, axis, "rms_norm")
    wide = array.astype(_factors.compute_dtype(array.dtype))
    return _normalised(array, wide, weight, None, dims, epsilon, "rms_norm")


def embedding(ids: ArrayLike, table: ArrayLike) -> jax.Array:
    r"""Returns rows of a table, whose gradient has scale one.

    .. math:: y_i = W_{t_i}, \qquad
              \bar W_v = \Big(\frac V n\Big)^{1/2} \sum_{i:\, t_i = v} \bar y_i

    of V rows and n ids: each row is used n/V times on average.

    Args:
      ids: t, integers from 0 to V − 1; others give NaN, as ``jnp.take`` does.
      table: W, of shape (V, ...), of scale one.

    Returns:
      An array of the shape of ``ids`` followed by that of a row, in the dtype of ``table``.

    Raises:
      TypeError: ``ids`` are not integers, ``table`` not floating.
      ValueError: ``table`` is a scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(un.embedding(jnp.array([2, 0]), jnp.array([[1.0, -1.0], [0.5, 0.5], [2.0, 0.0]])))
      [[ 2.  0.]
       [ 1. -1.]]

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2.
    """
    rows = floating(table, "embedding's table")
    which = jnp.asarray(ids)
    if not jnp.issubdtype(which.dtype, jnp.integer):
        raise TypeError(f"embedding's ids must be integers, got {_tree.describe(ids)}.")
    if rows.ndim == 0:
        raise ValueError("embedding's table is a scalar. Expected: shape (rows, ...).")
    factor = math.sqrt(max(rows.shape[0], 1) / max(which.size, 1))
    return jnp.take(scale_bwd(rows, factor), which, axis=0)


def _checked_rate(rate: float) -> float:
    if isinstance(rate, int | float) and rate == 0:
        return 0.0
    number = static(rate, "rate")
    if number >= 1:
        raise ValueError(
            f"dropout's rate must be from 0 to below 1, got {number}. Fix: it is the share that is "
            "dropped."
        )
    return number


def _dims(x: jax.Array, axis: int | Sequence[int], what: str) -> tuple[int, ...]:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    if not axes or not all(-x.ndim <= dim < x.ndim for dim in axes):
        raise ValueError(
            f"{what} got axis={axis} for x of shape {x.shape}. Expected: dimensions of x. Fix: -1 "
            "for the last one, (-2, -1) for two."
        )
    return tuple(sorted(dim % x.ndim for dim in axes))


def _normalised(
    x: jax.Array,
    centred: jax.Array,
    weight: ArrayLike | None,
    bias: ArrayLike | None,
    dims: tuple[int, ...],
    epsilon: float,
    what: str,
) -> jax.Array:
    """``centred`` at RMS one, times a weight, plus a bias, in the dtype of ``x``."""
    square = jnp.mean(jnp.square(centred), dims, keepdims=True)
    y = centred * jax.lax.rsqrt(square + epsilon)
    if weight is not None:
        y = y * _parameter(weight, y, dims, f"{what}'s weight")
    if bias is not None:
        y = y + _parameter(bias, y, dims, f"{what}'s bias")
    return y.astype(x.dtype)


def _parameter(x: ArrayLike, y: jax.Array, dims: tuple[int, ...], what: str) -> jax.Array:
    """A parameter as it broadcasts to ``y``, whose gradient is divided by the root of its uses."""
    array = floating(x, what)
    shape = tuple(y.shape[dim] for dim in dims)
    if array.shape != shape:
        raise ValueError(
            f"{what} has shape {array.shape}. Expected: {shape}, the dimensions that are "
            "normalised over. Fix: make it so, or pass other ones as axis=."
        )
    factor = math.sqrt(max(array.size, 1) / max(y.size, 1))
    placed = [size if dim in dims else 1 for dim, size in enumerate(y.shape)]
    return scale_bwd(array, factor).astype(y.dtype).reshape(placed)
