"""Directories of checkpoints: what is refused, and one that is either complete or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import jax
import numpy as np

from uscale_jax._checkpoint_orbax import METADATA

_CHECKPOINT_METADATA = "_CHECKPOINT_METADATA"
_UNFINISHED = ".orbax-checkpoint-tmp"
_SUFFIX = ".uscale_jax-unfinished"


def checked_paths(source: Any, target: Any) -> tuple[Path, Path]:
    """Returns the two paths, absolute.

    Raises:
      FileNotFoundError: there is no source.
      FileExistsError: there is a target.
      ValueError: a path is no local one, or one lies in the other.
    """
    for name, path in (("source", source), ("target", target)):
        if "://" in os.fspath(path):
            raise ValueError(
                f"{name}={os.fspath(path)!r} is no local path. Expected: a directory of a file "
                "system, where renaming is one step. Fix: mount the bucket, or copy."
            )
    there, here = Path(source).resolve(), Path(target).resolve()
    if not there.is_dir():
        raise FileNotFoundError(
            f"source={str(there)!r} is no directory. Expected: a checkpoint of Orbax."
        )
    _remove_leftovers(here)
    refuse_existing(here)
    if here.is_relative_to(there):
        raise ValueError(
            f"target={str(here)!r} lies in source={str(there)!r}, which stays as it is. Fix: a "
            "target elsewhere."
        )
    return there, here


def refuse_existing(target: Path) -> None:
    """Raises FileExistsError where there is something at the target."""
    if target.exists() or target.is_symlink():
        raise FileExistsError(
            f"target={str(target)!r} is there already; nothing was done. Fix: another target, or "
            "remove it."
        )


def items_of(source: Path) -> Mapping[str, Path]:
    """Returns the directories of the trees that a checkpoint holds, by name; "" for the only one.

    Raises:
      ValueError: it is no checkpoint, or one that was not finished.
    """
    if _UNFINISHED in source.name or source.name.endswith(_SUFFIX):
        raise ValueError(
            f"source={str(source)!r} is what is left of a checkpoint that was not finished. "
            "Fix: an earlier one."
        )
    if (source / METADATA).is_file():
        return {"": source}
    inner = sorted(path for path in source.iterdir() if path.is_dir())
    # A tree in a checkpoint, not a checkpoint in a directory of several.
    part = lambda path: not (path / _CHECKPOINT_METADATA).exists()  # noqa: E731
    whole = (source / _CHECKPOINT_METADATA).exists()
    trees = [path for path in inner if (path / METADATA).is_file()]
    found = {path.name: path for path in trees if whole or part(path)}
    if found:
        return found
    steps = [path.name for path in inner if _looks_like_one(path)]
    fix = (
        f"one of its steps, source={str(source / steps[-1])!r}" if steps else "a checkpoint's path"
    )
    holds = f"holds {', '.join(steps[-5:])}" if steps else f"has no file {METADATA!r}"
    raise ValueError(
        f"source={str(source)!r} is no checkpoint of Orbax: it {holds}. Expected: the directory of "
        f"one checkpoint. Fix: {fix}."
    )


def _looks_like_one(path: Path) -> bool:
    names = (_CHECKPOINT_METADATA, METADATA, f"*/{METADATA}")
    return any(next(path.glob(name), None) is not None for name in names)


def check_room(target: Path, size: int) -> None:
    """Raises OSError where the disk has no room for so many bytes."""
    parent = next(path for path in target.parents if path.exists())
    free = shutil.disk_usage(parent).free
    if free < size:
        raise OSError(
            f"the target needs up to {size / 2**30:.2f} GiB, {str(parent)!r} has "
            f"{free / 2**30:.2f} GiB left; nothing was done. Fix: make room, or a target elsewhere."
        )


def by_one(action: Callable[[], None]) -> None:
    """Runs the action in the first process; all of them wait for it, and raise if it failed."""
    error: BaseException | None = None
    if jax.process_index() == 0:
        try:
            action()
        except Exception as raised:
            error = raised
    if jax.process_count() > 1:
        from jax.experimental import multihost_utils

        done = multihost_utils.broadcast_one_to_all(np.int32(error is None))
        if not done and error is None:
            raise RuntimeError("resize_checkpoint: the first process failed; see its error.")
    if error is not None:
        raise error


@contextmanager
def building(target: Path) -> Iterator[Path]:
    """Yields a path to write a directory at, which is then renamed to the target.

    Whenever the process is killed, there is no target or all of it.  What a killed one has left is
    removed by the next one with this target; a lock, which goes with its process, tells a killed
    one from one that is still at work.
    """
    room = _room(target)
    with ExitStack() as stack:
        by_one(lambda: _claim(room, target, stack))
        try:
            yield room / "data"
            by_one(lambda: _commit(room, target))
        finally:
            if jax.process_index() == 0:
                shutil.rmtree(room, ignore_errors=True)


def _room(target: Path) -> Path:
    return target.parent / f"{target.name}{_SUFFIX}"


def _remove_leftovers(target: Path) -> None:
    """Removes the empty room of a process that was killed when its target was there."""
    room = _room(target)
    if target.exists() and (room / "lock").exists():
        with (room / "lock").open("w") as lock:
            if _locked(lock, room / "lock"):
                shutil.rmtree(room, ignore_errors=True)


def _claim(room: Path, target: Path, stack: ExitStack) -> None:
    room.mkdir(parents=True, exist_ok=True)
    lock = stack.enter_context((room / "lock").open("w"))
    if not _locked(lock, room / "lock"):
        raise RuntimeError(
            f"another process is writing target={str(target)!r}; nothing was done. Fix: wait for "
            "it, or another target."
        )
    refuse_existing(target)  # the other process may have finished by now
    for path in room.iterdir():
        if path.name != "lock":
            shutil.rmtree(path)


def _locked(file: IO[str], path: Path) -> bool:
    """Whether the file is now locked, and still the one at the path."""
    try:
        import fcntl
    except ImportError:  # no POSIX system: no lock, and Orbax hardly runs
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def _commit(room: Path, target: Path) -> None:
    refuse_existing(target)
    (room / "data").rename(target)


def copy_rest(source: Path, target: Path, items: Mapping[str, Path]) -> None:
    """Copies what belongs to a checkpoint besides its trees, and takes off what is too much."""
    for name in filter(None, items):
        (target / name / _CHECKPOINT_METADATA).unlink(missing_ok=True)
    names = [_CHECKPOINT_METADATA] if "" in items else [path.name for path in source.iterdir()]
    for name in names:
        if (source / name).is_dir() and name not in items:
            shutil.copytree(source / name, target / name)
        elif (source / name).is_file():
            shutil.copy2(source / name, target / name)
