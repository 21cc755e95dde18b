"""The tree of a checkpoint for the other model: how every array in it is made, and placed."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np

from uscale_jax import _factors, _grow, _jax, _tree
from uscale_jax._checkpoint_orbax import Stored, StoredArray, finished, nested, read
from uscale_jax._checkpoint_places import leaves_of
from uscale_jax._checkpoint_write import Lazy
from uscale_jax._progress import Advance
from uscale_jax._state import Resizing
from uscale_jax._types import Key
from uscale_jax._work import Work, fitted


@dataclass(frozen=True, eq=False)
class Made:
    """An array of the target, by the one that it is made from."""

    source: StoredArray
    shape: tuple[int, ...]
    run: Callable[..., Any] | None = None
    """``run(array, sharding)``; None where it is the same array."""
    of: str = ""
    """What is refused where it holds NaN."""


def replaced(tree: Any, place: Key, change: Callable[[Any], Any]) -> Any:
    """Returns the tree with another subtree at a place."""
    if not place:
        return change(tree)
    return {**tree, place[0]: replaced(tree[place[0]], place[1:], change)}


def with_parameters(node: Any, work: Iterable[Work], of: str) -> Any:
    """Returns a tree of parameters, and what else is in it, for the other model."""
    works, leaves = list(work), leaves_of(node)
    made = {each.key: Made(leaves[each.source], each.shape, each.run, of) for each in works}
    whole = nested(made.items())
    if () in made:
        return whole
    old = {each.source[0] for each in works}
    return {**{name: inner for name, inner in node.items() if name not in old}, **whole}


def with_state(node: Any, resizing: Resizing) -> Any:
    """Returns the state of an optimizer for the other model."""
    plan = replace(resizing.plan, treedef=None, small_treedef=None)  # trees of dicts, as they lie
    make = lambda x, work: Made(x, work.shape, work.run, "the state holds")  # noqa: E731
    return replace(resizing, plan=plan, do=make).tree(node)


def lists_in(tree: Any, lists: Collection[Key]) -> set[Key]:
    """Returns where dicts of the new tree are lists: where those that they are made from are."""
    found = set(lists)
    for path, leaf in leaves_of(tree).items():
        source = leaf.source.key if isinstance(leaf, Made) else leaf.key
        if len(path) == len(source):
            found |= {path[:i] for i in range(len(path)) if source[:i] in lists}
    return found


def listed(node: Any, path: Key, lists: Collection[Key]) -> Any:
    """Returns a tree of dicts with its lists as lists."""
    if not isinstance(node, dict) or not node:
        return node
    inner = {name: listed(value, (*path, name), lists) for name, value in node.items()}
    places = [str(i) for i in range(len(inner))]
    return [inner[i] for i in places] if path in lists and set(places) == set(inner) else inner


def as_made(tree: Any) -> Any:
    """Returns the tree with all arrays as made ones, but those of NumPy that stay."""

    def made(leaf: Any) -> Any:
        same = isinstance(leaf, StoredArray) and leaf.kind == "jax.Array"
        return Made(leaf, leaf.shape) if same else leaf

    return jax.tree.map(made, tree)


def arrays_in(tree: Any) -> dict[Key, Made]:
    """Returns the made arrays by path."""
    return {path: leaf for path, leaf in leaves_of(tree).items() if isinstance(leaf, Made)}


def placed(tree: Any, shardings: Any) -> Mapping[Key, jax.sharding.Sharding]:
    """Returns how every array of the target is to be sharded.

    Args:
      tree: the tree with made arrays.
      shardings: a function of name and ``jax.ShapeDtypeStruct``, a tree prefix, or None.

    Raises:
      TypeError: one is no sharding that arrays can be read and written by.
      ValueError: one does not divide its array, or that is of 64 bits, which are switched off.
    """
    arrays = arrays_in(tree)
    for path, made in arrays.items():
        _check_dtype(path, made.source.dtype)
    asked = _asked(tree, arrays, shardings)
    found = {path: asked[path] or _own(made) for path, made in arrays.items()}
    for path, sharding in found.items():
        _check_sharding(path, arrays[path], sharding)
    return found


def _asked(tree: Any, arrays: Mapping[Key, Made], shardings: Any) -> Mapping[Key, Any]:
    if shardings is None:
        return dict.fromkeys(arrays)
    if callable(shardings):
        shape = {k: jax.ShapeDtypeStruct(x.shape, x.source.dtype) for k, x in arrays.items()}
        return {path: shardings(_tree.name(path), shape[path]) for path in arrays}
    entries = set(_tree.flatten_named(shardings)[0])
    others = [path for path in leaves_of(tree) if path not in arrays]
    extra = [path for path in others if any(path[:i] in entries for i in range(len(path) + 1))]
    paths = [*arrays, *extra]
    values = _tree.broadcast_prefix(shardings, tree, paths, what="shardings")
    return dict(zip(paths, values, strict=True))


def _own(made: Made) -> jax.sharding.Sharding:
    """As the checkpoint says where its devices are here; else one device, or copies on all."""
    try:
        stored = made.source.sharding.to_jax_sharding()
    except Exception:  # none is kept, or of devices that are not here: Orbax has no one error
        stored = None
    if isinstance(stored, jax.sharding.NamedSharding):
        return fitted(stored, made.shape)
    if jax.process_count() > 1:
        mesh = jax.sharding.Mesh(np.asarray(jax.devices()), ("devices",))
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    return jax.device_put(0).sharding


def _check_dtype(path: Key, dtype: Any) -> None:
    if isinstance(dtype, np.dtype) and jax.dtypes.canonicalize_dtype(dtype) != dtype:
        raise ValueError(
            f"{_tree.name(path)!r} is {dtype}, and 64 bits are switched off in JAX. Fix: "
            "jax.config.update('jax_enable_x64', True)."
        )


def _check_sharding(path: Key, made: Made, sharding: Any) -> None:
    named = isinstance(sharding, jax.sharding.NamedSharding)
    if not named and not isinstance(sharding, jax.sharding.SingleDeviceSharding):
        raise TypeError(
            f"the sharding for {_tree.name(path)!r} is {sharding!r:.200}. Expected: a "
            "NamedSharding or a SingleDeviceSharding."
        )
    if named and len(sharding.spec) > len(made.shape):
        raise ValueError(
            f"the sharding for {_tree.name(path)!r} is {sharding.spec}, for {len(sharding.spec)} "
            f"dimensions, and its shape is {made.shape}. Fix: PartitionSpec() for small arrays."
        )
    counts = _jax.shard_counts(sharding.spec, len(made.shape), sharding.mesh) if named else []
    for dim, count in enumerate(counts):
        if (size := made.shape[dim]) % count:
            raise ValueError(
                f"{_tree.name(path)!r} has shape {made.shape}, and dimension {dim} cannot be cut "
                f"into {count} parts as {sharding.spec} says. Fix: another sharding, or size "
                f"{-(-size // count) * count} there."
            )


def lazy(tree: Any, shardings: Mapping[Key, jax.sharding.Sharding], advance: Advance) -> Any:
    """Returns the tree with arrays that are made when they are written; the rest is read."""

    def value(path: Any, leaf: Any) -> Any:
        stored = leaf.source if isinstance(leaf, Made) else leaf
        if isinstance(leaf, Made):
            found: Any = _lazy(leaf, shardings[_tree.leaf_key(path)], advance)
        else:
            found = finished(read(leaf)) if isinstance(leaf, Stored) else leaf
        for name in reversed(getattr(stored, "box", ())):
            found = {name: found}
        return found

    return jax.tree_util.tree_map_with_path(value, tree)


def _lazy(made: Made, sharding: jax.sharding.Sharding, advance: Advance) -> Lazy:
    async def make() -> Any:
        array = await _value(made, sharding)
        advance(lazily.nbytes, _tree.name(made.source.key))
        return array

    lazily = Lazy(make, made.shape, made.source.dtype, tuple(sharding.shard_shape(made.shape)))
    return lazily


async def _value(made: Made, sharding: jax.sharding.Sharding) -> jax.Array:
    named = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
    x = await read(made.source, fitted(named, made.source.shape) if named else sharding)
    if made.run is None:
        return x
    if made.of and _factors.is_scaled(x) and _grow.has_nan(x):
        raise ValueError(
            f"{made.of} NaN: {_tree.name(made.source.key)!r} of the checkpoint. Expected: trained, "
            "finite values. Fix: go back to a checkpoint from before the divergence."
        )
    made_one = made.run(x, named)
    # NumPy's arrays were nowhere yet; those of JAX are where they shall be.
    return jax.block_until_ready(jax.device_put(made_one, sharding))
