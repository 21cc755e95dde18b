"""Model directories of Hugging Face's transformers, grown and shrunk a tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _grow, _shrink
from uscale_jax._checkpoint_files import checked_paths
from uscale_jax._hf_plan import ModelPlan as ModelPlan
from uscale_jax._hf_plan import plan as plan
from uscale_jax._hf_write import check_narrow, write_directory
from uscale_jax._importance import Importance
from uscale_jax._importance import importance as measured
from uscale_jax._safetensors import StoredTensor
from uscale_jax._select import select
from uscale_jax._types import Key, Tree
from uscale_jax._verify import verify as verify_models
from uscale_jax._work import Work

_SHARD = 5_000_000_000
_CHEAP = 20_000_000
"""The number of parameters up to which both models are run before the target is there."""


def grow(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    planned: ModelPlan | None = None,
    *,
    symmetry: str | None = None,
    amount: float | None = None,
    key: jax.Array | None = None,
    shard_size: int = _SHARD,
    verify: bool | None = None,
    progress: bool | None = None,
    **sizes: Any,
) -> Path:
    r"""Returns the path of a new model directory: the same function, larger.

    .. math:: W' = m\,(c + W)[\mathrm{maps}] - c

    ``AutoModel....from_pretrained(target)`` loads it in PyTorch and gives the same outputs; of a
    model without a head, hidden states whose units are repeated.  Weights are read, grown and
    written one at a time: the model is never in memory, only the largest tensor in its two sizes.
    Tied tensors stay tied, dtypes stay what they are (float8 too), tokenizers and other files are
    copied.

    The source is only read.  The target is made beside its path and renamed at the end: killed at
    any moment, there is no target or all of it.

    Args:
      source: a model directory; see :func:`plan`.
      target: where the new one is to be; must not exist.
      planned: what :func:`plan` returned, or None and ``sizes``.
      symmetry: how copies are told apart, see :func:`uscale_jax.grow`.
      amount: how much of it.
      key: a ``jax.random.key`` for it.
      shard_size: how many bytes a file of weights may have; more make several, with an index.
      verify: whether to run both models and compare before the target is there, which takes them
        into memory; by default where they are in float32 and have up to 20 million parameters.
      progress: whether to show on stderr how far it is; where that is a terminal by default.
      **sizes: new sizes, and the other arguments of :func:`plan`: ``width=2``, ...

    Returns:
      The absolute path of the target.

    Raises:
      FileExistsError: there is a target.
      FileNotFoundError: there is no source.
      ModuleNotFoundError: PyTorch or transformers is not installed.
      OSError: the disk has no room.
      ValueError: what :func:`plan` refuses; the plan is of another directory, or shrinks; a tensor
        holds NaN; in float8, a factor is no power of two, or a value leaves the format's range.

    Example:
      >>> import uscale_jax as us
      >>> us.hf.grow("models/llama", "models/larger", width=2)  # doctest: +SKIP

    References:
      :func:`uscale_jax.grow`.
    """
    there, here = _paths(source, target)
    planned = _planned(there, planned, sizes, grows=True)
    work = list(_grow.work(planned.plan, symmetry, amount, key))
    check_narrow(planned)
    check = _verified if _verifies(planned, verify) else None
    return write_directory(planned, here, work, shard_size, progress, check)


def shrink(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    planned: ModelPlan | None = None,
    *,
    importance: Importance | Mapping[str, Any] | str | None = None,
    shard_size: int = _SHARD,
    progress: bool | None = None,
    **sizes: Any,
) -> Path:
    r"""Returns the path of a new model directory with smaller sizes.

    Without ``importance`` it undoes :func:`grow`: units are the means of those that a larger model
    would have as copies, which is exact on what :func:`grow` made and a poor start for any other
    model; one tensor at a time.  With it the most important units and layers stay, as
    :func:`uscale_jax.shrink` says:

    .. code-block:: python

       planned = us.hf.plan(source, intermediate_size=2048)
       models = planned.plan.models
       found = us.importance(models.big, us.hf.load(planned), batches, planned.plan)
       us.hf.shrink(source, target, planned, importance=found)

    Args:
      source: a model directory; see :func:`plan`.
      target: where the new one is to be; must not exist.
      planned: what :func:`plan` returned, or None and ``sizes``.
      importance: what :func:`uscale_jax.importance` returned, numbers per unit by axis, or
        "magnitude" or "random", which need no data (see there what they are worth); these two and
        what is refitted take the model into memory.
      shard_size: how many bytes a file of weights may have.
      progress: whether to show on stderr how far it is; where that is a terminal by default.
      **sizes: new sizes, and the other arguments of :func:`plan`.

    Returns:
      The absolute path of the target.

    Raises:
      FileExistsError: there is a target.
      FileNotFoundError: there is no source.
      ModuleNotFoundError: PyTorch or transformers is not installed.
      OSError: the disk has no room.
      ValueError: what :func:`plan` refuses; the plan is of another directory, or grows; a tensor
        holds NaN.

    Example:
      >>> import uscale_jax as us
      >>> us.hf.shrink("models/larger", "models/llama", width="1/2")  # doctest: +SKIP

    References:
      :func:`uscale_jax.shrink`.
    """
    there, here = _paths(source, target)
    planned = _planned(there, planned, sizes, grows=False)
    work = list(_shrink.work(planned.plan))
    if importance is not None:
        chosen = _chosen(planned, importance)
        _check_layers(planned, work, chosen)
        work = chosen
    return write_directory(planned, here, work, shard_size, progress, None)


def load(planned: ModelPlan) -> Tree:
    """Returns the parameters of a planned directory, as the plan's functions take them.

    Args:
      planned: what :func:`plan` returned.

    Returns:
      A tree of nested dicts, by the parts of the tensors' names.

    Raises:
      ValueError: a file has changed since.

    Example:
      >>> import uscale_jax as us
      >>> planned = us.hf.plan("models/llama", width=2)  # doctest: +SKIP
      >>> planned.plan.models.small(us.hf.load(planned), tokens)  # doctest: +SKIP

    References:
      :func:`uscale_jax.importance`, which takes them.
    """
    arrays = {key: jnp.asarray(planned.tensor(key).read()) for key in planned.names}
    if planned.grows:
        return planned.plan.unflatten_small(arrays)
    return planned.plan.unflatten([arrays[leaf.key] for leaf in planned.plan.leaves.values()])


def _paths(source: Any, target: Any) -> tuple[Path, Path]:
    if not Path(source).is_dir():
        raise FileNotFoundError(
            f"source={str(source)!r} is no directory. Expected: a model as `save_pretrained` of "
            "transformers writes it. Fix: download it first."
        )
    return checked_paths(source, target)


def _planned(
    source: Path, planned: ModelPlan | None, sizes: Mapping[str, Any], grows: bool
) -> ModelPlan:
    if planned is None:
        planned = plan(source, **sizes)
    elif sizes:
        raise ValueError(
            f"there are both a plan and {', '.join(sizes)}. Fix: leave one of them out."
        )
    if planned.source != source:
        raise ValueError(
            f"the plan is for {str(planned.source)!r}, not for source={str(source)!r}. Fix: "
            "us.hf.plan(source, ...)."
        )
    if planned.grows != grows:
        changes = ", ".join(f"{n} {a} → {b}" for n, (a, b) in planned.sizes.items())
        other = "grow" if planned.grows else "shrink"
        raise ValueError(f"these sizes {other}: {changes}. Fix: us.hf.{other}.")
    return planned


# Units that are chosen


def _chosen(planned: ModelPlan, importance: Importance | Mapping[str, Any] | str) -> list[Work]:
    plan = planned.plan
    if isinstance(importance, str):
        importance = _without_data(planned, importance)
    refits = isinstance(importance, Importance) and importance.calibration is not None
    selected = select(plan, importance)
    work = list(_shrink.work(selected))
    if not refits:
        return work
    params = load(planned)
    leaves = _leaves(_shrink.shrink(params, plan, importance=importance))
    return [each._replace(run=_given(leaves[each.key])) for each in work]


def _given(value: Any) -> Callable[..., Any]:
    return lambda array, sharding=None: value


def _leaves(tree: Tree) -> dict[Key, Any]:
    pairs = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(part.key for part in path): leaf for path, leaf in pairs}


def _without_data(planned: ModelPlan, method: str) -> Importance:
    if method not in ("magnitude", "random"):
        raise ValueError(
            f"importance={method!r} needs data. Expected: 'magnitude', 'random', or numbers. Fix: "
            "pass what us.importance(...) returns."
        )
    models = planned.plan.models
    assert models is not None
    return measured(
        models.big,
        load(planned),
        [models.inputs],
        planned.plan,
        method=method,
        key=jax.random.key(0),
    )


def _check_layers(planned: ModelPlan, by_place: Sequence[Work], chosen: Sequence[Work]) -> None:
    """Refuses layers by importance where config.json says that layers are of several kinds."""
    kinds = {n: x for n, x in planned.config.items() if "layer" in n and isinstance(x, list)}
    mixed = [name for name, values in kinds.items() if len({*map(str, values)}) > 1]
    both = [{each.key: each.source for each in work} for work in (by_place, chosen)]
    if mixed and both[0] != both[1]:
        raise ValueError(
            f"layers of this model are of several kinds ({', '.join(mixed)} in config.json), and "
            "other layers would stay than the plan says. Fix: depth=[...], which layers are to "
            "stay, and no choice of layers."
        )


# Verification


def _verifies(planned: ModelPlan, verify: bool | None) -> bool:
    if verify is not None:
        return verify
    stored = [planned.tensor(leaf.source) for leaf in planned.plan.leaves.values()]
    count = sum(int(np.prod(leaf.big)) for leaf in planned.plan.leaves.values())
    return planned.plan.exact and count <= _CHEAP and all(x.dtype == "F32" for x in stored)


def _verified(planned: ModelPlan, written: Mapping[Key, StoredTensor]) -> None:
    models = planned.plan.models
    assert models is not None
    big = [jnp.asarray(written[leaf.key].read()) for leaf in planned.plan.leaves.values()]
    verify_models(
        planned.plan,
        models.small,
        load(planned),
        models.big,
        planned.plan.unflatten(big),
        *models.inputs,
    )
