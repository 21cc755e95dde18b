"""What a factor is, and how a leaf is multiplied by one: the arithmetic under everything else."""

from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax
from uscale_jax._types import Factor, Tree

_SMALLEST = float(jnp.finfo(jnp.float32).tiny)
_LARGEST = float(jnp.finfo(jnp.float32).max)


def _shape_and_dtype(k: Any, what: str) -> tuple[tuple[int, ...], Any]:
    if isinstance(k, bool | str | bytes) or not (
        isinstance(k, int | float | complex | np.generic | np.ndarray | jax.Array)
    ):
        raise TypeError(
            f"{what} must be a positive finite real scalar, got {k!r} of type "
            f"{type(k).__name__}. Fix: pass a Python, NumPy or JAX number, for example 2.0."
        )
    return np.shape(k), jnp.result_type(k)


def check_factor(k: Any, what: str = "k") -> Factor:
    """Returns ``k`` if it is a positive finite real scalar in the normal range of float32.

    A concrete ``k`` comes back as a Python float; a traced one as it is, with only its shape and
    dtype checked, because its value is not known yet.

    Raises:
      TypeError: not a number, or a boolean or complex one.
      ValueError: not a scalar, zero, negative, NaN, infinite, or so large or small that float32
        arithmetic would turn it into infinity or zero.
    """
    shape, dtype = _shape_and_dtype(k, what)
    if not (jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)):
        raise TypeError(f"{what} must be real, got {k!r} of dtype {dtype}. Fix: pass a float.")
    if shape != ():
        raise ValueError(
            f"{what} must be a scalar of shape (), got shape {shape}. Fix: pass one number, or a "
            f"tree prefix with one number per subtree."
        )
    if _jax.is_traced(k):
        return k
    value = float(k)
    if not _SMALLEST <= value <= _LARGEST:
        raise ValueError(
            f"{what} must be positive and finite (between {_SMALLEST:.3g} and {_LARGEST:.3g}, the "
            f"normal range of float32), got {value}. Fix: a factor k > 1 enlarges, 0 < k < 1 "
            f"shrinks."
        )
    return value


def is_scaled(leaf: Any) -> bool:
    """Returns whether factors apply to a leaf: floating and complex ones, not integers or keys."""
    return _is_inexact(leaf.dtype)


@cache
def _is_inexact(dtype: Any) -> bool:
    return bool(jnp.issubdtype(dtype, jnp.inexact))


def compute_dtype(dtype: Any) -> Any:
    """Returns the dtype a leaf is multiplied in: at least float32."""
    return jnp.dtype(dtype) if jnp.finfo(dtype).bits >= 32 else jnp.dtype(jnp.float32)


def _factor_array(factor: Factor, dtype: Any) -> jax.Array:
    return factor.astype(dtype) if isinstance(factor, jax.Array) else jnp.asarray(factor, dtype)


def multiply(x: jax.Array, factor: Factor) -> jax.Array:
    """Returns factor·x with the dtype, weak type and sharding of ``x``, rounded once."""
    wide = compute_dtype(x.dtype)
    product = x.astype(wide) * _factor_array(factor, wide)
    return _jax.with_weak_type(product.astype(x.dtype), x)


def multiply_tree(tree: Tree, factor: Factor) -> Tree:
    """Returns the tree with every floating leaf multiplied by one factor."""
    return jax.tree.map(lambda x: multiply(x, factor) if is_scaled(x) else x, tree)


def power(k: Factor, exponent: float | jax.Array) -> Factor:
    """Returns k**exponent, as a Python float where ``k`` is one."""
    if not isinstance(k, jax.Array):
        return float(k) ** exponent
    floating = jnp.issubdtype(k.dtype, jnp.floating)
    return k.astype(compute_dtype(k.dtype) if floating else jnp.float32) ** exponent


def add_multiple(x: jax.Array, factor: Factor, y: jax.Array) -> jax.Array:
    """Returns x + factor·y with the dtype and weak type of ``x``, rounded once."""
    wide = compute_dtype(x.dtype)
    total = x.astype(wide) + y.astype(wide) * _factor_array(factor, wide)
    return _jax.with_weak_type(total.astype(x.dtype), x)
