"""How one leaf of the other model is made, apart from where its leaves are kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax

from uscale_jax import _jax, _tree
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
    old = _jax.named_sharding(leaf)
    return None if old is None else fitted(old, shape)


def placements(
    works: Sequence[Work],
    sources: Sequence[Any],
    shardings: Any,
    what: str,
    others: Sequence[Key] = (),
) -> list[jax.sharding.NamedSharding | None]:
    """Returns how every array is to be sharded: as asked, else as the one that it is made from.

    Args:
      works: what is made.
      sources: the arrays that it is made from.
      shardings: a function of name and ``jax.ShapeDtypeStruct``, a tree prefix, or None.
      what: the function that is called, for messages.
      others: where a tree may say what is not asked for: leaves that stay as they are.

    Raises:
      TypeError: one is no ``NamedSharding``.
      ValueError: sizes do not divide.
    """
    asked = _asked(works, sources, shardings, others)
    own = map(_jax.named_sharding, sources)
    places = [one or old for one, old in zip(asked, own, strict=True)]
    triples = zip(works, sources, places, strict=True)
    lines = [line for each, x, place in triples if (line := _misfit(each, x, place))]
    if lines:
        advice = (
            "Expected: sizes that the parts divide. Fix: a model of such sizes, or say where "
            "arrays are to be, shardings=lambda name, leaf: NamedSharding(mesh, ...)."
        )
        first = f"{what}: not all arrays can be sharded so."
        raise ValueError("\n".join([first, *lines[:8], advice]))
    return places


def _asked(
    works: Sequence[Work], sources: Sequence[Any], shardings: Any, others: Sequence[Key]
) -> list[Any]:
    keys = [each.key for each in works]
    if shardings is None:
        return [None] * len(keys)
    if callable(shardings):
        shapes = [
            jax.ShapeDtypeStruct(each.shape, x.dtype)
            for each, x in zip(works, sources, strict=True)
        ]
        return [shardings(_tree.name(key), x) for key, x in zip(keys, shapes, strict=True)]
    entries = set(_tree.flatten_named(shardings)[0])
    more = [key for key in others if any(key[:i] in entries for i in range(len(key) + 1))]
    every = [*keys, *more]
    found = _tree.broadcast_prefix(shardings, dict.fromkeys(every), every, what="shardings")
    return found[: len(keys)]


def _misfit(work: Work, x: Any, place: Any) -> str | None:
    """What is wrong with a sharding, with a size that fits."""
    name, shape = _tree.name(work.key), work.shape
    if place is None:
        return None
    if not isinstance(place, jax.sharding.NamedSharding):
        raise TypeError(
            f"the sharding for {name!r} is {place!r:.200}. Expected: a jax.sharding.NamedSharding."
        )
    shown = f"  {name!r} is {x.dtype}[{','.join(map(str, shape))}], the sharding {place.spec}"
    if len(place.spec) > len(shape):
        return f"{shown} is for {len(place.spec)} dimensions"
    counts = _jax.shard_counts(place.spec, len(shape), place.mesh)
    for dim, (size, count) in enumerate(zip(shape, counts, strict=True)):
        if size % count:
            fits = -(-size // count) * count
            return f"{shown} cuts dimension {dim} into {count} parts: {fits} is a size that fits"
    return None


def placed(x: Any, sharding: jax.sharding.NamedSharding | None) -> Any:
    """Returns an array on the devices of the sharding that what is made from it is to have."""
    there = _jax.committed_devices(x)
    if sharding is None or there is None or there == sharding.device_set:
        return x
    return jax.device_put(x, fitted(sharding, x.shape))


def at_place(x: Any, sharding: jax.sharding.NamedSharding | None) -> Any:
    """Returns an array with a sharding."""
    same = sharding is None or _jax.named_sharding(x) == sharding
    return x if same else jax.device_put(x, sharding)


def compiled(run: Callable[..., Any], sharding: jax.sharding.NamedSharding | None) -> Any:
    """Returns a compiled function of arrays, whose one result is sharded so."""
    if sharding is None:
        return jax.jit(run)
    if _jax.is_explicit(sharding.mesh):
        run = jax.sharding.auto_axes(partial(run), out_sharding=sharding)
    # Within a trace of the user's a type names a mesh without devices, and says it all.
    concrete = isinstance(sharding.mesh, jax.sharding.Mesh)
    return jax.jit(run, out_shardings=sharding) if concrete else jax.jit(run)
