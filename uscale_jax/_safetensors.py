"""Files of safetensors: what is in them, one tensor read, tensors written one after another.

The format is eight bytes with the length of a header, the header, which is JSON with dtype, shape
and place of every tensor, and the tensors' bytes.  It is read and written here because that takes
few lines, so that every dtype works (float8 included), and so that one tensor at a time is in
memory.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

DTYPES: Mapping[str, np.dtype[Any]] = {
    "BOOL": np.dtype(bool),
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "U16": np.dtype(np.uint16),
    "I16": np.dtype(np.int16),
    "U32": np.dtype(np.uint32),
    "I32": np.dtype(np.int32),
    "U64": np.dtype(np.uint64),
    "I64": np.dtype(np.int64),
    "F8_E4M3": jnp.dtype(jnp.float8_e4m3fn),
    "F8_E5M2": jnp.dtype(jnp.float8_e5m2),
    "F16": np.dtype(np.float16),
    "BF16": jnp.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
}
"""By the format's names."""

_LONGEST_HEADER = 100_000_000
"""What readers of the format accept."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file."""

    name: str
    dtype: str
    """As the format calls it."""
    shape: tuple[int, ...]
    file: Path
    start: int
    """Its first byte in the file."""

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize

    def read(self) -> np.ndarray[Any, Any]:
        """Return its values."""
        count = math.prod(self.shape)
        flat = np.fromfile(self.file, DTYPES[self.dtype], count, offset=self.start)
        return flat.reshape(self.shape)


@dataclass(frozen=True)
class TensorFile:
    """A file and what is in it."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_header(file: Path) -> TensorFile:
    """Returns what a file holds; of the tensors nothing is read.

    Raises:
      ValueError: it is no such file, is cut short, or has a dtype that is not known.
    """
    size = file.stat().st_size
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
            raise _broken(file, f"its header would be {length} bytes long, the file has {size}")
        text = opened.read(length)
    try:
        entries = json.loads(text)
    except ValueError as error:
        raise _broken(file, f"its header is no JSON: {error}") from None
    metadata = entries.pop("__metadata__", None) or {}
    tensors = {name: _stored(name, entry, file, 8 + length) for name, entry in entries.items()}
    for tensor in tensors.values():
        if tensor.start + tensor.nbytes > size:
            raise _broken(file, f"it ends at byte {size}, before the end of {tensor.name!r}")
    return TensorFile(tensors, metadata)


def _broken(file: Path, why: str) -> ValueError:
    return ValueError(
        f"{str(file)!r} is no complete file of safetensors: {why}. Fix: copy or download it again."
    )


def _stored(name: str, entry: Mapping[str, Any], file: Path, data: int) -> StoredTensor:
    dtype, shape = entry["dtype"], tuple(entry["shape"])
    if dtype not in DTYPES:
        raise ValueError(
            f"tensor {name!r} of {str(file)!r} has dtype {dtype!r}. Expected: one of "
            f"{', '.join(DTYPES)}. Fix: convert it first."
        )
    start, end = entry["data_offsets"]
    tensor = StoredTensor(name, dtype, shape, file, data + start)
    if end - start != tensor.nbytes:
        raise _broken(file, f"{name!r} has {end - start} bytes, its shape says {tensor.nbytes}")
    return tensor


@dataclass(frozen=True)
class NewTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Return its size."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_file(
    file: Path,
    tensors: Sequence[NewTensor],
    values: Iterable[np.ndarray[Any, Any]],
    metadata: Mapping[str, str],
) -> None:
    """Writes a file; each value is written, and forgotten, before the next one is asked for."""
    ordered = _header(tensors, metadata)
    text = json.dumps(ordered, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at multiples of eight bytes
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        for tensor, value in zip(tensors, values, strict=True):
            _check_value(tensor, value)
            np.ascontiguousarray(value).tofile(opened)


def _header(tensors: Sequence[NewTensor], metadata: Mapping[str, str]) -> dict[str, Any]:
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    place = 0
    for tensor in tensors:
        end = place + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [place, end],
        }
        place = end
    return entries


def _check_value(tensor: NewTensor, value: np.ndarray[Any, Any]) -> None:
    made = value.dtype, value.shape
    if made != (DTYPES[tensor.dtype], tensor.shape):
        raise AssertionError(f"{tensor} was announced, {made} was made")


def in_order(tensors: Sequence[NewTensor]) -> list[NewTensor]:
    """Returns tensors as writers of the format order them: wide dtypes first, then by name.

    So every tensor begins at a multiple of the size of its elements.
    """
    return sorted(tensors, key=lambda t: (-DTYPES[t.dtype].itemsize, t.name))


def in_shards(tensors: Sequence[NewTensor], largest: int) -> Iterator[list[NewTensor]]:
    """Yields tensors for one file after another, of at most so many bytes or of one tensor."""
    shard: list[NewTensor] = []
    size = 0
    for tensor in tensors:
        if shard and size + tensor.nbytes > largest:
            yield shard
            shard, size = [], 0
        shard.append(tensor)
        size += tensor.nbytes
    yield shard
