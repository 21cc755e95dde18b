"""What a checkpoint of Orbax holds, and one leaf of it."""

from __future__ import annotations

import asyncio
import importlib
import json
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from uscale_jax import _tree
from uscale_jax._types import Key

METADATA = "_METADATA"
"""The file that says of what a tree consists."""

_SEQUENCE = 1  # what Orbax calls the key of a list; others are keys of dicts
_EMPTY: Mapping[str, Callable[[], Any]] = {
    "None": lambda: None,
    "NamedTuple": lambda: None,
    "Dict": dict,
    "List": list,
    "Tuple": tuple,
}


def orbax() -> Any:
    """Returns the module ``orbax.checkpoint``.

    Raises:
      ModuleNotFoundError: it is not installed.
    """
    try:
        return importlib.import_module("orbax.checkpoint")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "resize_checkpoint reads and writes with Orbax, which is not installed. Fix: "
            "pip install 'uscale_jax[checkpoints]'."
        ) from error


@dataclass(frozen=True, eq=False)
class Item:
    """A tree that a checkpoint holds."""

    directory: Path
    tree: Any
    """Of dicts; leaves are :class:`Stored`, or None, or empty containers."""
    lists: frozenset[Key]
    """Where its dicts are lists in truth."""
    custom: Any
    """What the user of Orbax has noted in its metadata."""


@dataclass(frozen=True, eq=False)
class Stored:
    """A leaf that lies in a checkpoint."""

    key: Key
    """Its path in the checkpoint."""
    kind: str
    """What Orbax calls its type: "jax.Array", "np.ndarray", "scalar", "string"."""
    info: Any
    """Orbax's description of where it lies."""
    box: Key = ()
    """The end of its path that is no part of its name."""

    def boxed(self, name: str) -> Stored:
        """Return it with one more name at the end of its path that does not count."""
        return replace(self, key=self.key[:-1], box=(name, *self.box))


@dataclass(frozen=True, eq=False)
class StoredArray(Stored):
    """An array that lies in a checkpoint."""

    shape: tuple[int, ...] = ()
    dtype: Any = None
    sharding: Any = None
    """How it was sharded, in Orbax's words."""
    generator: str | None = None
    """Of random keys, what makes numbers of them."""

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Return its values, read from the checkpoint."""
        del copy
        one = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return np.asarray(finished(read(self, one)), dtype)


def nested(pairs: Iterable[tuple[Key, Any]]) -> Any:
    """Returns values by path as dicts in dicts."""
    root: dict[str, Any] = {}
    for path, value in pairs:
        if path == ():
            return value
        inner = root
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = value
    return root


def read_item(directory: Path, prefix: Key) -> Item:
    """Returns what a directory of Orbax says that it holds; reads no values.

    Args:
      directory: where the file ``_METADATA`` is.
      prefix: how the tree is called in a checkpoint of several.

    Raises:
      ValueError: it is of a kind that cannot be read.
    """
    described = json.loads((directory / METADATA).read_text())
    kinds: dict[Key, str] = {}
    lists: set[Key] = set()
    for entry in described["tree_metadata"].values():
        path = tuple(str(part["key"]) for part in entry["key_metadata"])
        steps = [part["key_type"] for part in entry["key_metadata"]]
        lists |= {(*prefix, *path[:i]) for i, step in enumerate(steps) if step == _SEQUENCE}
        kinds[path] = entry["value_metadata"]["value_type"]
    inside = {path[:i] for path in kinds for i in range(len(path))}
    kinds = {path: kind for path, kind in kinds.items() if path not in inside}
    info = _infos(directory, described)
    stored = {path: info(path) for path, kind in kinds.items() if kind not in _EMPTY}
    leaves = [Stored((*prefix, *path), kinds[path], info) for path, info in stored.items()]
    values = dict(zip(stored, _with_shapes(leaves, _random_keys(directory)), strict=True))
    empty = {path: _EMPTY[kind]() for path, kind in kinds.items() if kind in _EMPTY}
    tree = nested({**values, **empty}.items())
    return Item(directory, tree, frozenset(lists), described.get("custom_metadata"))


def _with_shapes(leaves: Sequence[Stored], keys: Mapping[str, str]) -> list[Stored]:
    described: dict[Key, Any] = {}
    for kind in dict.fromkeys(leaf.kind for leaf in leaves):
        alike = [leaf for leaf in leaves if leaf.kind == kind]
        found = finished(_handler(alike[0]).metadata([leaf.info for leaf in alike]))
        described |= {leaf.key: meta for leaf, meta in zip(alike, found, strict=True)}
    return [_with_shape(leaf, described[leaf.key], keys) for leaf in leaves]


def _infos(directory: Path, described: Mapping[str, Any]) -> Callable[[Key], Any]:
    handlers = orbax().type_handlers
    epath = importlib.import_module("etils.epath")
    where = epath.Path(directory)
    ocdbt = described.get("use_ocdbt")
    ocdbt = handlers.is_ocdbt_checkpoint(where) if ocdbt is None else ocdbt
    # Orbax keeps 100 MB of what it has read of the directory, which fill with every array opened.
    tensorstore = importlib.import_module("tensorstore")
    small = {"cache_pool#ocdbt": {"total_bytes_limit": 0}}
    context = tensorstore.Context(small, parent=handlers.get_ts_context(use_ocdbt=ocdbt))

    def info(path: Key) -> Any:
        name = ".".join(path)
        return handlers.ParamInfo(
            name=name,
            path=where / name,
            parent_dir=where,
            is_ocdbt_checkpoint=ocdbt,
            use_zarr3=described.get("use_zarr3", False),
            ts_context=context,
            raise_array_data_missing_error=described.get(
                "store_array_data_equal_to_fill_value", False
            ),
        )

    return info


def _handler(leaf: Stored) -> Any:
    try:
        return orbax().type_handlers.get_type_handler(leaf.kind)
    except ValueError:
        raise ValueError(
            f"leaf {_tree.name(leaf.key)!r} of the checkpoint is of type {leaf.kind!r}, for which "
            "Orbax has no handler here. Fix: register it, orbax.checkpoint.type_handlers."
            "register_type_handler."
        ) from None


def _random_keys(directory: Path) -> Mapping[str, str]:
    """Which arrays are random keys, and of which generator."""
    files = sorted((directory / "array_metadatas").glob("process_*"))
    entries = [each for file in files for each in json.loads(file.read_text())["array_metadatas"]]
    described = [entry["array_metadata"] for entry in entries]
    extra = {each["param_name"]: each.get("ext_metadata") or {} for each in described}
    return {
        name: more["random_key_impl"] for name, more in extra.items() if "random_key_impl" in more
    }


def _with_shape(leaf: Stored, meta: Any, keys: Mapping[str, str]) -> Stored:
    if leaf.kind not in ("jax.Array", "np.ndarray"):
        return leaf
    shape, dtype, generator = tuple(meta.shape), np.dtype(meta.dtype), keys.get(leaf.info.name)
    if generator is not None:
        one = jax.random.key(0, impl=generator)
        shape, dtype = shape[: len(shape) - jax.random.key_data(one).ndim], one.dtype
    return StoredArray(leaf.key, leaf.kind, leaf.info, (), shape, dtype, meta.sharding, generator)


def finished(work: Coroutine[Any, Any, Any]) -> Any:
    """Returns the result of a coroutine, in a notebook too, where a loop is running already."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, work).result()


async def read(leaf: Stored, sharding: jax.sharding.Sharding | None = None) -> Any:
    """Returns the value of a leaf; an array of JAX is read shard by shard."""
    handlers = orbax().type_handlers
    if leaf.kind == "jax.Array":
        handler = handlers.ArrayHandler()  # the usual one reads of all arrays for each
        args = handlers.ArrayRestoreArgs(sharding=sharding)
    else:
        handler = _handler(leaf)
        numpy = leaf.kind == "np.ndarray"
        args = handlers.RestoreArgs(restore_type=np.ndarray if numpy else None)
    [value] = await handler.deserialize([leaf.info], [args])
    await asyncio.sleep(0)  # else the loop keeps what was awaited, value and all, till the next
    if isinstance(leaf, StoredArray) and leaf.generator is not None:
        return jax.random.wrap_key_data(value, impl=leaf.generator)
    return value
