"""Names of leaves, and tree prefixes that match by name instead of by container type."""

from collections.abc import Callable, Collection, Sequence
from typing import Any

import jax
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from uscale_jax._types import Key, Tree

# Attribute under which flax's Param and Partitioned boxes hold their array.  It is dropped from
# names, so that boxed and bare trees of one model name their leaves alike.
_BOX_ATTRIBUTES = ("value", "_value")


def _key_string(entry: Any) -> str:
    if isinstance(entry, GetAttrKey):
        return str(entry.name)
    if isinstance(entry, SequenceKey):
        return str(entry.idx)
    if isinstance(entry, DictKey | FlattenedIndexKey):
        return str(entry.key)
    return str(entry)


def leaf_key(path: Sequence[Any]) -> Key:
    """Returns the strings of a JAX key path, less the attribute of a box at its end."""
    boxed = path and isinstance(path[-1], GetAttrKey) and path[-1].name in _BOX_ATTRIBUTES
    return tuple(_key_string(entry) for entry in (path[:-1] if boxed else path))


def name(key: Key) -> str:
    """Returns a key as people write it: ``'params/Dense_0/kernel'``."""
    return "/".join(key) or "(the tree itself)"


def describe(leaf: Any) -> str:
    """Returns what a leaf is, for messages: ``'float32[3,5]'``, or its value and type."""
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}] ({type(leaf).__name__})"
    return f"{leaf!r:.60} of type {type(leaf).__name__}"


def flatten_named(
    tree: Tree, is_leaf: Callable[[Any], bool] | None = None
) -> tuple[list[Key], list[Any], Any]:
    """Returns the keys and the leaves of a tree, in order, and its structure."""
    pairs, treedef = jax.tree_util.tree_flatten_with_path(tree, is_leaf=is_leaf)
    return [leaf_key(path) for path, _ in pairs], [leaf for _, leaf in pairs], treedef


def _nearest(entries: Collection[Key], key: Key) -> Key | None:
    lengths = range(len(key), -1, -1)
    return next((key[:n] for n in lengths if key[:n] in entries), None)


def _misfit(what: str, missing: Sequence[Key], unused: Sequence[Key]) -> ValueError:
    lines = [f"{what} does not fit the tree it is for."]
    lines += [f"  no entry of {what} covers leaf {name(key)!r}" for key in missing[:8]]
    lines += [f"  no leaf of the tree lies at entry {name(key)!r} of {what}" for key in unused[:8]]
    advice = (
        "Expected: one scalar, or a tree prefix with an entry for every subtree, got "
        f"{len(missing)} leaves without an entry and {len(unused)} entries without a leaf. "
        "Fix: spell the entries as the tree does; use 1.0 for what should stay as it is."
    )
    return ValueError("\n".join([*lines, advice]))


def _without_empty(tree: Tree, unused: Sequence[Key]) -> list[Key]:
    """Entries at or below a subtree without leaves are no mistake: drops them from ``unused``."""
    is_empty = lambda node: not jax.tree.leaves(node)  # noqa: E731
    keys, nodes, _ = flatten_named(tree, is_leaf=is_empty)
    empty = {key for key, node in zip(keys, nodes, strict=True) if is_empty(node)}
    return [key for key in unused if _nearest(empty, key) is None]


def broadcast_prefix(prefix: Tree, tree: Tree, keys: Sequence[Key], *, what: str) -> list[Any]:
    """Returns the entry of ``prefix`` for each of ``keys``, which are the leaves of ``tree``.

    Entries and leaves meet by name, so a plain dict fits a ``FrozenDict`` or an ``nnx.State``,
    boxed or bare.  Every leaf must be covered, and every entry used unless it lies over a part of
    the tree without leaves (None, ``optax.MaskedNode``, an empty dict).

    Raises:
      ValueError: naming the leaves that nothing covers and the entries that cover nothing.
    """
    entry_keys, values, _ = flatten_named(prefix, is_leaf=lambda x: x is None)
    entries = dict(zip(entry_keys, values, strict=True))
    if prefix is not None:  # None in a prefix stands for a leaf that is not there
        entries = {key: value for key, value in entries.items() if value is not None}
    nearest = [_nearest(entries, key) for key in keys]
    missing = [key for key, hit in zip(keys, nearest, strict=True) if hit is None]
    unused = [key for key in entries if key not in set(nearest)]
    unused = _without_empty(tree, unused) if unused else unused
    if missing or (unused and entry_keys != [()]):
        raise _misfit(what, missing, unused)
    return [entries[hit] for hit in nearest if hit is not None]
