"""Index maps along dimensions that are cut over devices, each of which has a part."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax

_MOST_NEIGHBOURS = 4
"""From how many other parts a part is copied before all are gathered: a message a neighbour."""

Sends: TypeAlias = tuple[tuple[tuple[int, int], ...], ...]
"""What parts are sent, by (from, to): one entry for every piece that a part is made of."""


class Cut(NamedTuple):
    """How a dimension is indexed part by part; it is static, maps are arguments."""

    sharding: jax.sharding.NamedSharding
    names: tuple[str, ...]
    """Axes of the mesh."""
    sends: Sends | None
    """None where all parts are gathered."""


class Way(NamedTuple):
    """How places along a dimension are taken; it is static."""

    cut: Cut | None
    repeat: int = 0
    """How many copies there are, side by side, of every unit; 0 where a map says it."""


STILL = Way(None)


def to_grow(
    x: Any,
    maps: Sequence[Any],
    averages: Sequence[Sequence[Any]],
    place: jax.sharding.NamedSharding | None,
) -> tuple[tuple[Any, ...], tuple[Way, ...]]:
    """Returns the maps with places in the parts at hand, and per dimension what is done with them.

    A compiler that does not know the maps gathers whole dimensions.  They are known here, and
    copies mostly lie in the part that their unit lies in, so that nothing has to move.  Where
    they lie side by side there is nothing to look up either.
    """
    shape = np.shape(x)
    found = [
        _repeated(old, size) if old is not None else (None, STILL)
        for old, size in zip(maps, shape, strict=True)
    ]
    for axis, names in _cut_axes(x, maps, place):
        if place is not None and not (averages and len(averages[axis])):
            count = _count(place, names)
            sends, old = _sends(maps[axis], shape[axis], count)
            repeat = found[axis][1].repeat
            found[axis] = None if repeat else old, Way(Cut(place, names, sends), repeat)
    return tuple(old for old, _ in found), tuple(way for _, way in found)


def _repeated(old: Any, size: int) -> tuple[Any, Way]:
    """The map, or how many copies it makes of every unit."""
    repeat = len(old) // max(size, 1)
    same = repeat * size == len(old) and np.array_equal(old, np.repeat(np.arange(size), repeat))
    return (None, Way(None, repeat)) if same and repeat else (old, STILL)


def to_shrink(
    x: Any, maps: Sequence[Any], shape: Sequence[int], place: jax.sharding.NamedSharding | None
) -> tuple[Cut | None, ...]:
    """Returns along which dimensions all copies of a unit lie in the part that it will lie in."""
    cuts: list[Cut | None] = [None] * len(maps)
    for axis, names in _cut_axes(x, maps, place):
        if place is None:
            continue
        count, old = _count(place, names), np.asarray(maps[axis])
        there = old >= 0
        part = np.arange(len(old)) // (len(old) // count)
        if np.array_equal(old[there] // (shape[axis] // count), part[there]):
            cuts[axis] = Cut(place, names, ((),))
    return tuple(cuts)


def local(places: Any, size: int, count: int) -> Any:
    """Returns places along a dimension as places in their parts; negative ones stay."""
    return np.where(places < 0, places, places % (size // count))


def parts(cut: Cut) -> int:
    """Returns how many parts there are."""
    return _count(cut.sharding, cut.names)


def by_part(
    cut: Cut, axis: int, run: Callable[..., jax.Array], x: jax.Array, *vectors: Any
) -> jax.Array:
    """Returns ``run(part, *vectors)`` of every part, with the vectors cut like the dimension."""
    entries = [*cut.sharding.spec, *[None] * (x.ndim - len(cut.sharding.spec))]
    spec, along = jax.sharding.PartitionSpec(*entries), jax.sharding.PartitionSpec(cut.names)

    def own(part: jax.Array, *own_vectors: Any) -> jax.Array:
        return run(_near(part, axis, cut), *own_vectors)

    # Within auto_axes the mesh of the context is this one with other types of axes.
    mesh = None if _jax.is_explicit(cut.sharding.mesh) else cut.sharding.mesh
    specs = (spec, *[along] * len(vectors))
    mapped = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=spec)
    return mapped(x, *map(jnp.asarray, vectors))


def _near(part: jax.Array, axis: int, cut: Cut) -> jax.Array:
    """A part, with the pieces that it needs besides."""
    if cut.sends is None:
        return jax.lax.all_gather(part, cut.names, axis=axis, tiled=True)
    pieces = [jax.lax.ppermute(part, cut.names, pairs) if pairs else part for pairs in cut.sends]
    return pieces[0] if len(pieces) == 1 else jnp.concatenate(pieces, axis=axis)


def _sends(old: Any, size: int, count: int) -> tuple[Sends | None, Any]:
    """Which parts are sent where, and the places in what is at hand then."""
    old = np.asarray(old)
    to, width = np.arange(len(old)) // (len(old) // count), size // count
    source = np.where(old < 0, to, old // width)
    apart = (source - to) % count
    steps = sorted({0, *apart.tolist()})
    if len(steps) - 1 > _MOST_NEIGHBOURS:
        return None, old
    pairs = [
        tuple(sorted({*zip(source[apart == s].tolist(), to[apart == s].tolist(), strict=True)}))
        for s in steps[1:]
    ]
    slot = np.searchsorted(steps, apart)
    return ((), *pairs), np.where(old < 0, old, old % width + slot * width)


def _cut_axes(
    x: Any, maps: Sequence[Any], place: jax.sharding.NamedSharding | None
) -> list[tuple[int, tuple[str, ...]]]:
    """The dimensions that maps are along and that are cut, alike before and after."""
    own = _jax.named_sharding(x)
    if place is None or own is None or jnp.issubdtype(x.dtype, jax.dtypes.extended):
        return []
    before, after = (_jax.spec_axes(each.spec, len(maps)) for each in (own, place))
    if own.mesh != place.mesh or before != after:
        return []
    chosen = [(axis, names) for axis, names in enumerate(after) if maps[axis] is not None]
    return [(axis, names) for axis, names in chosen if _count(place, names) > 1]


def _count(sharding: jax.sharding.NamedSharding, names: Sequence[str]) -> int:
    return int(np.prod([sharding.mesh.shape[name] for name in names], dtype=np.int64))
