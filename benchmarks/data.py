"""The corpus: text files as bytes, some held out, and the windows cut from them."""

from __future__ import annotations

import functools
import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.registry import UsageError

VOCAB = 256
HELD_OUT_FRACTION = 0.05
MIN_BYTES = 65_536
MAX_BYTES = 256 * 2**20
MIN_PART_BYTES = 2048
SKIPPED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
)


@dataclass(frozen=True)
class TextFile:
    """A file's name relative to the corpus folder, and its bytes."""

    name: str
    content: bytes


@dataclass(frozen=True)
class Corpus:
    """Training and held-out bytes (uint8), the files they are made of, and a checksum."""

    train: np.ndarray
    held_out: np.ndarray
    train_files: tuple[str, ...]
    held_out_files: tuple[str, ...]
    sha256: str


@functools.lru_cache(maxsize=2)
def read_files(path: Path | None) -> tuple[TextFile, ...]:
    """Return the text files at ``path``, or the standard library's sources, sorted by name."""
    if path is None:
        root, pattern = Path(sysconfig.get_paths()["stdlib"]), "*.py"
    elif path.exists():
        root, pattern = path, "*"
    else:
        raise UsageError(f"no data at {path}: no such file or folder")
    files = tuple(_readable(root, pattern))
    total = sum(len(file.content) for file in files)
    if total < MIN_BYTES:
        where = f"in {root}" if root.is_dir() else f"({root})"
        raise UsageError(f"{total} bytes of text {where}: need at least {MIN_BYTES}")
    if total > MAX_BYTES:
        raise UsageError(f"{total} bytes of text at {root}: the limit is {MAX_BYTES}")
    return files


def _readable(root: Path, pattern: str) -> Iterator[TextFile]:
    """Yield the non-empty UTF-8 files, leaving out hidden, test and unreadable ones."""
    for path in [root] if root.is_file() else sorted(root.rglob(pattern)):
        relative = path.relative_to(root) if path != root else Path(path.name)
        hidden = path != root and any(part.startswith(".") for part in relative.parts)
        if hidden or SKIPPED_FOLDERS.intersection(relative.parts[:-1]) or not path.is_file():
            continue
        try:
            content = path.read_bytes()
            content.decode("utf-8")
        except (OSError, UnicodeDecodeError):
            continue
        if content and b"\0" not in content:
            yield TextFile(relative.as_posix(), content)


def corpus_sha256(path: Path | None) -> str:
    """Return the sha256 of all files of the corpus, before any split."""
    digest = hashlib.sha256()
    for file in read_files(path):
        digest.update(len(file.content).to_bytes(8, "little"))
        digest.update(file.content)
    return digest.hexdigest()


def load_corpus(path: Path | None, seed: int) -> Corpus:
    """Return the corpus with whole files held out, chosen by the seed.

    A single file cannot be held out whole; its last part is held out instead.
    """
    files = read_files(path)
    parts = _split_file(files[0]) if len(files) == 1 else _split_files(files, seed)
    train, held_out = (b"".join(file.content for file in part) for part in parts)
    if min(len(train), len(held_out)) < MIN_PART_BYTES:
        raise UsageError(f"too few bytes: {len(train)} to train on, {len(held_out)} held out")
    return Corpus(
        train=np.frombuffer(train, np.uint8),
        held_out=np.frombuffer(held_out, np.uint8),
        train_files=tuple(file.name for file in parts[0]),
        held_out_files=tuple(file.name for file in parts[1]),
        sha256=corpus_sha256(path),
    )


def _split_files(
    files: tuple[TextFile, ...], seed: int
) -> tuple[tuple[TextFile, ...], tuple[TextFile, ...]]:
    """Return (training files, held-out files), at least one file in each."""
    wanted = HELD_OUT_FRACTION * sum(len(file.content) for file in files)
    held_out: set[int] = set()
    held_bytes = 0
    for index in np.random.default_rng([seed, 0]).permutation(len(files))[:-1]:
        if held_bytes >= wanted:
            break
        held_out.add(int(index))
        held_bytes += len(files[index].content)
    return (
        tuple(file for i, file in enumerate(files) if i not in held_out),
        tuple(file for i, file in enumerate(files) if i in held_out),
    )


def _split_file(file: TextFile) -> tuple[tuple[TextFile, ...], tuple[TextFile, ...]]:
    """Return the file's head for training and its tail held out, split after a line."""
    cut = int(len(file.content) * (1 - HELD_OUT_FRACTION))
    cut = file.content.rfind(b"\n", cut // 2, cut) + 1 or cut
    head = TextFile(f"{file.name} (head)", file.content[:cut])
    tail = TextFile(f"{file.name} (tail)", file.content[cut:])
    return (head,), (tail,)


def unigram_bits(tokens: np.ndarray) -> float:
    """Return the entropy in bits per byte of the text's own byte frequencies.

    No model that ignores context can do better on this text.
    """
    frequency = np.bincount(tokens, minlength=VOCAB) / len(tokens)
    present = frequency[frequency > 0]
    return float(-(present * np.log2(present)).sum())


def random_windows(
    tokens: np.ndarray, shape: tuple[int, ...], length: int, rng: np.random.Generator
) -> np.ndarray:
    """Return windows (*shape, length) that start at random places."""
    starts = rng.integers(0, len(tokens) - length + 1, size=shape)
    return tokens[starts[..., None] + np.arange(length)]


def spread_windows(tokens: np.ndarray, shape: tuple[int, ...], length: int) -> np.ndarray:
    """Return windows (*shape, length) at equal distances over the whole text."""
    starts = np.linspace(0, len(tokens) - length, num=int(np.prod(shape))).astype(np.int64)
    return tokens[starts.reshape(shape)[..., None] + np.arange(length)]
