"""Writes a planned model directory, a tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax import _grow, _progress
from uscale_jax._checkpoint_files import building, check_room
from uscale_jax._hf_config import write_config
from uscale_jax._hf_files import copy_files, other_files, read_directory, write_weights
from uscale_jax._hf_plan import ModelPlan, stored_names
from uscale_jax._plan import LeafPlan
from uscale_jax._safetensors import DTYPES, NewTensor, StoredTensor
from uscale_jax._types import Key
from uscale_jax._work import Work

Check: TypeAlias = Callable[[ModelPlan, Mapping[Key, StoredTensor]], None]
"""Looks at what is written before it is at its place."""


def write_directory(
    planned: ModelPlan,
    target: Path,
    work: Sequence[Work],
    shard_size: int,
    progress: bool | None,
    check: Check | None,
) -> Path:
    """Returns the target, which is there with all that belongs to it or not at all."""
    names = stored_names(planned, {each.key: each.source for each in work})
    made = {names[each.key]: each for each in work}
    tensors = [_new(name, planned.tensor(each.source), each.shape) for name, each in made.items()]
    same = {name: planned.stored.tensors[name] for name in planned.copied}
    tensors += [_new(name, tensor, tensor.shape) for name, tensor in same.items()]
    size = sum(tensor.nbytes for tensor in tensors)
    check_room(target, size)
    with building(target) as data, _progress.progress(f"write {target.name}", size, progress) as on:

        def value(name: str) -> np.ndarray[Any, Any]:
            array = same[name].read() if name in same else _made(planned, made[name])
            on(array.nbytes, name)
            return array

        data.mkdir()
        write_weights(data, tensors, value, planned.stored.metadata, shard_size)
        write_config(planned.config, data / "config.json")
        copy_files(planned.source, data, other_files(planned.source)[0])
        if check is not None:
            written = read_directory(data).tensors
            check(planned, {key: written[name] for key, name in names.items()})
    return target


def _new(name: str, like: StoredTensor, shape: tuple[int, ...]) -> NewTensor:
    return NewTensor(name, like.dtype, shape)


def _made(planned: ModelPlan, work: Work) -> np.ndarray[Any, Any]:
    stored = planned.tensor(work.source)
    x = jnp.asarray(stored.read())
    if _grow.has_nan(x):
        raise ValueError(
            f"the parameters hold NaN: {stored.name!r} in {stored.file.name!r}. Expected: trained, "
            "finite values. Fix: go back to a checkpoint from before the divergence."
        )
    found = np.asarray(work.run(x))
    if found.itemsize == 1 and planned.grows:
        _check_exact(stored, found, np.asarray(work.run(x.astype(jnp.float32))))
    return found


# Formats of eight bits


def check_narrow(planned: ModelPlan) -> None:
    """Refuses factors that float8 has no place for."""
    leaves = planned.plan.leaves.values()
    narrow = [each for each in leaves if DTYPES[planned.tensor(each.source).dtype].itemsize == 1]
    rounded = [each for each in narrow if not _is_exact(each)]
    if rounded:
        lines = [f"  {planned.names[each.source]!r} × {each.words}" for each in rounded[:8]]
        raise ValueError(
            "\n".join(
                [
                    "weights in float8 would be rounded again, by factors that are no powers of 2:",
                    *lines,
                    "Expected: factors that only change exponents.",
                    "Fix: sizes that grow by powers of 2, or weights in bfloat16.",
                ]
            )
        )


def _is_exact(leaf: LeafPlan) -> bool:
    mantissas = [np.frexp(factor)[0] for factor in leaf.factors]
    powers = all(np.all(np.isin(np.abs(m), (0.0, 0.5))) for m in mantissas)
    return powers and leaf.shift == 0 and not any(leaf.averages)


def _check_exact(stored: StoredTensor, found: Any, wanted: Any) -> None:
    if not np.array_equal(found.astype(np.float32), wanted):
        raise ValueError(
            f"{stored.name!r} is {found.dtype}, and some of its values times their factor are out "
            "of that format's range or between its smallest numbers. Fix: weights in bfloat16."
        )
