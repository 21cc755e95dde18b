"""How one leaf of the other model is made, apart from where its leaves are kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from uscale_jax import _jax
from uscale_jax._types import Key


class Work(NamedTuple):
    """How one array is made from one array of the model there is."""

    key: Key
    """Where it stands in the other model's tree."""
    source: Key
    """Where the array it is made from stands in this model's tree."""
    shape: tuple[int, ...]
    run: Callable[..., Any]
    """``run(array, sharding=None)`` returns it: with the array's sharding, as far as that divides
    it, or with another."""


def fitted(
    sharding: jax.sharding.NamedSharding, shape: tuple[int, ...]
) -> jax.sharding.NamedSharding:
    """Returns the sharding for another shape, less what does not divide it."""
    counts = _jax.shard_counts(sharding.spec, len(shape), sharding.mesh)
    entries = [*sharding.spec, *[None] * (len(shape) - len(sharding.spec))]
    kept = [
        entry if size % count == 0 else None
        for entry, size, count in zip(entries, shape, counts, strict=True)
    ]
    spec = jax.sharding.PartitionSpec(*kept)
    return jax.sharding.NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)


def resized_sharding(leaf: Any, shape: tuple[int, ...]) -> jax.sharding.NamedSharding | None:
    """Returns the leaf's named sharding for another shape; None where it has none."""
    old = None if _jax.is_traced(leaf) else getattr(leaf, "sharding", None)
    return fitted(old, shape) if isinstance(old, jax.sharding.NamedSharding) else None
