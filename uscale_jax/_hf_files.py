"""Model directories: which tensor is where, and a new directory written a tensor at a time."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from uscale_jax._safetensors import (
    NewTensor,
    StoredTensor,
    in_order,
    in_shards,
    read_header,
    write_file,
)

_INDEX = "model.safetensors.index.json"
_ONE = "model.safetensors"
_WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|ckpt|h5|msgpack|onnx|onnx_data|gguf|ot|tflite|mlmodel)"
    r"|.*\.(safetensors|bin|h5)\.index\.json|config\.json"
)
"""Files of the model itself, in this or another format; the rest is copied."""


class Stored(NamedTuple):
    """The tensors of a directory."""

    tensors: Mapping[str, StoredTensor]
    metadata: Mapping[str, str]


def read_directory(source: Path) -> Stored:
    """Returns what tensors a model directory holds; none of them is read.

    Raises:
      ValueError: it holds none in this format, a file is broken or missing.
    """
    files = _files(source)
    headers = [read_header(file) for file in files]
    tensors = {name: tensor for header in headers for name, tensor in header.tensors.items()}
    return Stored(tensors, {"format": "pt", **headers[0].metadata})


def _files(source: Path) -> list[Path]:
    index = source / _INDEX
    if index.is_file():
        named = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        files = [source / name for name in dict.fromkeys(named)]
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(
                f"{str(source)!r} is not complete: its index names {', '.join(missing[:4])}, which "
                "is not there. Fix: copy or download it again."
            )
        return files
    if (source / _ONE).is_file():
        return [source / _ONE]
    raise ValueError(
        f"source={str(source)!r} holds neither {_ONE!r} nor {_INDEX!r}. Expected: weights as "
        "safetensors. Fix: load it with transformers and `save_pretrained`."
    )


# Names

_OLD_NAMES = {"weight": "gamma", "bias": "beta"}
"""What norms of models converted from TensorFlow are called in files."""


def names_in_files(
    states: Iterable[str], tied: Mapping[str, str], files: Sequence[str], prefix: str
) -> dict[str, str]:
    """Returns under which name every tensor of a model is in files.

    A base model's files serve models with a head, and the other way round: names in them then
    lack the base model's prefix, or have it besides.  Of tied tensors one is in files, or all.

    Args:
      states: names in the model, tied ones once.
      tied: by every further name of a tied tensor, the one in ``states``.
      files: names in files.
      prefix: what the base model is called within models with a head.

    Raises:
      ValueError: some are in no file.
    """
    stored = set(files)
    aliases: dict[str, list[str]] = {name: [name] for name in states}
    for other, owner in tied.items():
        aliases[owner].append(other)
    ways = {"": "", f"{prefix}.": "", "-": f"{prefix}."}
    found: list[dict[str, str]] = []
    for off, on in ways.items():
        variants = {
            name: [v for alias in also for v in _variants(on + alias.removeprefix(off))]
            for name, also in aliases.items()
        }
        hits = {name: next((v for v in vs if v in stored), "") for name, vs in variants.items()}
        found.append({name: hit for name, hit in hits.items() if hit})
    best = max(found, key=len)
    if missing := [name for name in aliases if name not in best]:
        raise ValueError(
            f"the files lack {len(missing)} of the model's {len(aliases)} tensors: "
            f"{', '.join(missing[:6])}. They hold, for example, {', '.join(sorted(files)[:4])}. "
            "Expected: the weights of the class in config.json. Fix: architecture=... of the class "
            "they belong to."
        )
    return best


def _variants(name: str) -> tuple[str, ...]:
    outer, _, last = name.rpartition(".")
    return (name, f"{outer}.{_OLD_NAMES[last]}") if last in _OLD_NAMES else (name,)


def name_like(name: str, source: str, stored: str) -> str:
    """Returns what a tensor is called in files, by a tensor of another layer.

    >>> name_like("model.layers.4.norm.weight", "model.layers.2.norm.weight", "layers.2.norm.gamma")
    'layers.4.norm.gamma'

    Raises:
      ValueError: layers do not have their numbers in the files' names.
    """
    new, old = ([p for p in text.split(".") if p.isdecimal()] for text in (name, source))
    parts = stored.split(".")
    places = [i for i, part in enumerate(parts) if part.isdecimal()]
    if [parts[i] for i in places] != old:
        raise ValueError(
            f"{source!r} is called {stored!r} in the files, which says nothing of the name of "
            f"{name!r}. Fix: save the model with another version of transformers."
        )
    for place, number in zip(places, new, strict=True):
        parts[place] = number
    return ".".join(parts)


# Writing


def file_names(shards: int) -> list[str]:
    """Returns what files are called, as transformers does."""
    if shards == 1:
        return [_ONE]
    return [f"model-{i + 1:05}-of-{shards:05}.safetensors" for i in range(shards)]


def write_weights(
    target: Path,
    tensors: Sequence[NewTensor],
    value: Any,
    metadata: Mapping[str, str],
    largest: int,
) -> None:
    """Writes weights, of several files with their index.

    Args:
      target: the directory.
      tensors: what is to be written.
      value: a function from a tensor's name to its array.
      metadata: what the files say of themselves.
      largest: how many bytes a file may have.
    """
    shards = list(in_shards(in_order(tensors), largest))
    names = file_names(len(shards))
    for name, shard in zip(names, shards, strict=True):
        values: Iterator[np.ndarray[Any, Any]] = (value(tensor.name) for tensor in shard)
        write_file(target / name, shard, values, metadata)
    if len(shards) > 1:
        _write_index(target, dict(zip(names, shards, strict=True)))


def _write_index(target: Path, shards: Mapping[str, Sequence[NewTensor]]) -> None:
    size = sum(tensor.nbytes for shard in shards.values() for tensor in shard)
    places = {tensor.name: name for name, shard in shards.items() for tensor in shard}
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(places.items()))}
    (target / _INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def other_files(source: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files to copy, tokenizers and the like, and those of weights to leave out."""
    files = [path.relative_to(source) for path in sorted(source.rglob("*")) if path.is_file()]
    weights = [path for path in files if _WEIGHTS.fullmatch(path.name) and not _inner_json(path)]
    own = {path for path in weights if len(path.parts) == 1 and _is_read(path.name)}
    return [path for path in files if path not in weights], [p for p in weights if p not in own]


def _inner_json(path: Path) -> bool:
    """A part's configuration, such as that of a pooling layer, is no weight."""
    return path.name == "config.json" and len(path.parts) > 1


def _is_read(name: str) -> bool:
    return name == "config.json" or (name.startswith("model") and ".safetensors" in name)


def copy_files(source: Path, target: Path, files: Iterable[Path]) -> None:
    """Copies files by their paths in the source."""
    for path in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source / path, target / path)
