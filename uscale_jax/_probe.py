"""Stand-ins: known values in place of the user's arrays, to run update functions on."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax._types import Tree

# Stand-ins keep structure and rank; dimensions are cut to this, so that probing a large model
# costs what probing a small one does.
_LARGEST_DIM = 6


def noise_like(shapes: Tree, seed: int, rms: float) -> Tree:
    """Returns normal values of the given root mean square, zeros in leaves that are no floats.

    Drawn on the host: a generator in a compiled step would be compiled again for every leaf.
    """
    rng = np.random.default_rng(seed)
    return jax.device_put(jax.tree.map(lambda x: _normal(x, rng, rms), shapes))


def _normal(x: Any, rng: np.random.Generator, rms: float) -> np.ndarray[Any, Any]:
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        return np.zeros(x.shape, x.dtype)
    return (rms * rng.standard_normal(x.shape, np.float32)).astype(x.dtype)


def small_shapes(tree: Tree) -> Tree:
    """Returns the shapes and dtypes of the tree with all dimensions cut."""
    return jax.tree.map(_small_shape, tree)


def _small_shape(x: Any) -> jax.ShapeDtypeStruct:
    shape = tuple(min(size, _LARGEST_DIM) for size in np.shape(x))
    return jax.ShapeDtypeStruct(shape, jnp.result_type(x))


def generic_values(shapes: Tree, seed: int) -> Tree:
    """Returns values no formula cancels on: floats in [0.5, 1.5], zeros for counts and flags."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: _generic(x, rng), shapes)


def _generic(x: jax.ShapeDtypeStruct, rng: np.random.Generator) -> Any:
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), x.shape)
    if jnp.issubdtype(x.dtype, jnp.inexact):
        return jnp.asarray(rng.uniform(0.5, 1.5, x.shape).astype(x.dtype))
    return jnp.zeros(x.shape, x.dtype)
