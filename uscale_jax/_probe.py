"""Running update functions on stand-ins: small known values in place of the user's arrays."""

from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax._types import Tree

# Stand-ins keep structure and rank; dimensions are cut to this, so that probing a large model
# costs what probing a small one does.
_LARGEST_DIM = 6


def random_like(tree: Tree, seed: int, rms: float) -> Tree:
    """Returns normal values of the given root mean square in the shapes and dtypes of ``tree``."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            jnp.asarray(rms * rng.standard_normal(np.shape(x))).astype(jnp.result_type(x))
            if jnp.issubdtype(jnp.result_type(x), jnp.inexact)
            else x
        ),
        tree,
    )


def norm(tree: Tree) -> float:
    """Returns the 2-norm over all floating leaves, accumulated in float64 on the host."""
    leaves = (x for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.inexact))
    squares = (np.sum(np.abs(np.asarray(x, _wide(x.dtype))) ** 2) for x in leaves)
    return float(np.sqrt(sum(squares)))


def _wide(dtype: Any) -> Any:
    complex_ = jnp.issubdtype(dtype, jnp.complexfloating)
    return np.complex128 if complex_ else np.float64


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
        return np.asarray(rng.uniform(0.5, 1.5, x.shape)).astype(x.dtype)
    return np.zeros(x.shape, x.dtype)


def trajectory(
    step: Callable[[Tree, Tree], tuple[Tree, Tree]], state: Tree, inputs: Iterator[Tree]
) -> Iterator[Tree]:
    """Yields the outputs of ``output, state = step(input, state)`` over the inputs."""
    for one in inputs:
        output, state = step(one, state)
        yield output


def scaled_noise(shapes: Tree, seed: int, magnitude: float) -> Tree:
    """Returns normal values times ``magnitude`` in the floating leaves, zeros in the others."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda x: (
            (magnitude * rng.standard_normal(x.shape)).astype(x.dtype)
            if jnp.issubdtype(x.dtype, jnp.inexact)
            else np.zeros(x.shape, x.dtype)
        ),
        shapes,
    )
