"""A checkpoint of Orbax, written leaf by leaf.

Orbax writes whole trees.  Here the leaves of a tree are made when their turn comes, by a type
handler around Orbax's own for ``jax.Array``: files and metadata are what it always writes.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from uscale_jax._checkpoint_orbax import orbax

_CHUNK = 2**22  # bytes that are compressed at once
_FEWEST_IN_A_CHUNK = 2**15
_DATA_FILE = 2**25  # bytes after which Orbax writes what it has compressed
_BATCH = 2**24  # bytes of small leaves that are written together


@dataclass(frozen=True, eq=False)
class Lazy:
    """An array that is made when it is written."""

    make: Callable[[], Awaitable[Any]]
    shape: tuple[int, ...]
    dtype: Any
    part: tuple[int, ...]
    """The shape of a shard."""

    @property
    def nbytes(self) -> int:
        """Return how large it will be."""
        return size_of(self.shape, self.dtype)


def size_of(shape: Sequence[int], dtype: Any) -> int:
    """Returns the bytes of an array."""
    return math.prod(shape) * int(dtype.itemsize)


class _Waiting:
    """A handler of Orbax that returns when all is written; a ``TypeHandler`` by its methods.

    Otherwise threads would still be writing when something else has failed and is cleaned up.
    """

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def typestr(self) -> str:
        """Return what its values are called in the checkpoint."""
        return str(self.inner.typestr())

    def memory_size(self, values: Sequence[Any]) -> Any:
        """Return what is written and read of each (asked for by Orbax 0.11)."""
        return self.inner.memory_size(values)

    async def serialize(
        self, values: Sequence[Any], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Write values, and wait for that."""
        for future in await self.inner.serialize(values, infos, args):
            future.result()
        return []


class _Streaming(_Waiting):
    """Orbax's handler for arrays, fed with a few at a time."""

    def memory_size(self, values: Sequence[Lazy]) -> Any:
        """Return what is written and read of each."""
        return [(value.nbytes, value.nbytes) for value in values]

    async def serialize(
        self, values: Sequence[Lazy], infos: Sequence[Any], args: Sequence[Any] | None = None
    ) -> Sequence[Any]:
        """Make and write arrays; small ones together."""
        batch: list[tuple[Any, Any, Any]] = []
        size = 0
        triples = zip(values, infos, args or [None] * len(values), strict=True)
        for value, info, arg in triples:
            if size + value.nbytes > _BATCH:
                await self._write(batch)
                size = 0
            batch.append((await value.make(), info, arg))
            size += value.nbytes
        await self._write(batch)
        return []

    async def _write(self, batch: list[tuple[Any, Any, Any]]) -> None:
        """Write arrays and forget them."""
        if batch:
            columns = [list(column) for column in zip(*batch, strict=True)]
            batch.clear()
            await super().serialize(*columns)


def write_item(directory: Path, tree: Any, custom: Any) -> None:
    """Writes a tree with lazy leaves as Orbax would; by all processes together."""
    ocp = orbax()
    handler_of = ocp.type_handlers.get_type_handler
    others = {type(leaf) for leaf in jax.tree.leaves(tree)} - {Lazy}
    registry = ocp.type_handlers.create_type_handler_registry(
        (Lazy, _Streaming(handler_of(jax.Array))),
        (jax.Array, handler_of(jax.Array)),  # which Orbax asks for where it keeps what it knows
        *((kind, _Waiting(handler_of(kind))) for kind in others),
    )
    args = ocp.args.PyTreeSave(
        tree,
        save_args=jax.tree.map(_save_args, tree),
        ocdbt_target_data_file_size=_DATA_FILE,
        custom_metadata=custom,
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(directory, args=args)


def _save_args(leaf: Any) -> Any:
    chunk = _chunk_bytes(leaf.part, leaf.dtype) if isinstance(leaf, Lazy) else None
    return orbax().SaveArgs(chunk_byte_size=chunk)


def _chunk_bytes(shape: Sequence[int], dtype: Any) -> int | None:
    """The bytes of a chunk; None where divisors of the shape leave only crumbs of one.

    Orbax halves, thirds, ... the largest dimension until a chunk is small enough, so that a large
    prime becomes 1 at once.
    """
    dims = list(shape)
    if size_of(dims, dtype) <= _CHUNK:
        return None
    while size_of(dims, dtype) > _CHUNK:
        i = dims.index(max(dims))
        dims[i] //= next(p for p in range(2, dims[i] + 1) if dims[i] % p == 0)
    return _CHUNK if size_of(dims, dtype) >= _FEWEST_IN_A_CHUNK else None
