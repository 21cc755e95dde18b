"""resize_checkpoint: a checkpoint of the other model of a plan, made leaf by leaf."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import optax

from uscale_jax import _grow, _progress, _shrink, _tree
from uscale_jax._checkpoint_files import (
    building,
    by_one,
    check_room,
    checked_paths,
    copy_rest,
    items_of,
)
from uscale_jax._checkpoint_orbax import Item, orbax, read_item
from uscale_jax._checkpoint_places import Found, Where, located, node_at
from uscale_jax._checkpoint_tree import (
    arrays_in,
    as_made,
    lazy,
    listed,
    lists_in,
    placed,
    replaced,
    with_parameters,
    with_state,
)
from uscale_jax._checkpoint_write import size_of, write_item
from uscale_jax._plan import Plan
from uscale_jax._state import Resizing, resizing_of, warn_of_numbers
from uscale_jax._types import Key
from uscale_jax._work import Work


def resize_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    plan: Plan,
    *,
    params: Where = None,
    opt_state: Where = None,
    optimizer: optax.GradientTransformation | None = None,
    new_layers: str = "mapped",
    symmetry: str | None = None,
    amount: float | None = None,
    key: jax.Array | None = None,
    shardings: Any = None,
    progress: bool | None = None,
) -> Path:
    r"""Returns the path of a new Orbax checkpoint, of the other model of a plan.

    .. math:: W' = m\,(c + W)[\mathrm{maps}] - c, \qquad S' = S[\mathrm{maps}]

    Its values are bit for bit those of :func:`grow` (:func:`shrink` where the checkpoint is of the
    big model) and :func:`resize_state` on what Orbax restores, but a leaf at a time: no model is in
    memory, only the largest leaf in its two sizes (and what noise or shrinking need besides).  It
    is laid out as the source is, so that it is restored in the same way: a directory of
    ``StandardCheckpointer`` or ``PyTreeCheckpointer``, a step of a ``CheckpointManager``, or one of
    Orbax's API v1.  Everything in it that is not of the model (steps, counts, random keys, JSON)
    stays as it is.  NumPy arrays that are resized become arrays of JAX.

    The source is only read.  The target is made beside its path and renamed at the end: killed at
    any moment, there is no target or all of it, and calling again does the work.

    Several processes (``jax.distributed``) call it alike, with paths that they share.

    Args:
      source: the directory of one checkpoint, on a file system.
      target: where the new one is to be; must not exist.
      plan: what :func:`plan` returned, or ``Plan.from_json``.  To prune, what :func:`select`
        returned; nothing is refitted.
      params: the path in the checkpoint at which the parameters are, as in ``"params"`` or
        ``"state/params"``, "" for the whole; a list where averages of them are kept too, ``()`` for
        none.  Found where it is None and clear.
      opt_state: the same of the state of the optimizer, found by names such as "opt_state".  What
        is named in neither stays as it is.
      optimizer: the optimizer, where its state is to go on without :func:`scale_optimizer`; see
        :func:`resize_state`.
      new_layers: "mapped" or "zeros", see :func:`resize_state`.
      symmetry: how copies are told apart, see :func:`grow`.
      amount: how much of it.
      key: a ``jax.random.key`` for it.
      shardings: where arrays of the target are to be while they are made, and how its files are
        cut: a function of a leaf's name and its ``jax.ShapeDtypeStruct``, or a tree prefix like the
        target.  Every shard is read, made and written where it belongs.  By default the sharding
        that the checkpoint tells of, as far as it divides the new shapes and its devices are here;
        else one device, or copies on all where there are several processes.
      progress: whether to show on stderr how far it is; where that is a terminal by default.

    Returns:
      The absolute path of the target.

    Raises:
      FileExistsError: there is a target.
      FileNotFoundError: there is no source.
      ModuleNotFoundError: Orbax is not installed.
      OSError: the disk has no room.
      TypeError: a sharding is neither a ``NamedSharding`` nor a ``SingleDeviceSharding``.
      ValueError: the source is no finished checkpoint, or of another model; it is not clear where
        its parameters are; a sharding does not divide its array; an array holds NaN.  All but the
        last are refused before any work.

    Example:
      >>> import tempfile, jax.numpy as jnp, optax
      >>> import orbax.checkpoint as ocp
      >>> import uscale_jax as us
      >>> from pathlib import Path
      >>> apply = lambda params, x: jnp.tanh(x @ params["up"]) @ params["down"]
      >>> params = {"up": jnp.ones((5, 7)), "down": jnp.ones((7, 3))}
      >>> shapes = {"up": jnp.ones((5, 14)), "down": jnp.ones((14, 3))}
      >>> plan = us.plan(apply, params, apply, shapes, jnp.ones((2, 5)))
      >>> adam = optax.adam(1e-3)
      >>> folder = tempfile.TemporaryDirectory()
      >>> small, big = Path(folder.name, "small"), Path(folder.name, "big")
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     checkpointer.save(small, {"params": params, "opt_state": adam.init(params)})
      >>> path = us.resize_checkpoint(small, big, plan)
      >>> wanted = {"params": shapes, "opt_state": adam.init(shapes)}
      >>> with ocp.StandardCheckpointer() as checkpointer:
      ...     restored = checkpointer.restore(big, wanted)
      >>> restored["params"]["down"].shape, float(restored["params"]["down"][0, 0])
      ((14, 3), 0.5)
      >>> restored["opt_state"][0].mu["up"].shape
      (5, 14)
      >>> folder.cleanup()

    References:
      The format: Orbax's guides, https://orbax.readthedocs.io.
    """
    orbax()
    there, here = checked_paths(source, target)
    parts = items(items_of(there))
    found = located(whole(parts), plan, params, opt_state)
    states = {
        place: resizing_of(node_at(found.tree, place), plan, optimizer, new_layers)
        for place in found.states
    }
    grows = _direction(found.grows, states)
    if optimizer is None:
        for resizing in states.values():
            warn_of_numbers(resizing.arrays, plan, stacklevel=3)
    work = _work(plan, grows, symmetry, amount, key)
    tree = _resized(found, states, work, grows)
    where = placed(tree, shardings)
    size = sum(size_of(made.shape, made.source.dtype) for made in arrays_in(tree).values())
    check_room(here, size)
    lists = lists_in(tree, frozenset[Key]().union(*(item.lists for item in parts.values())))
    shown = progress if jax.process_index() == 0 else False
    with (
        building(here) as data,
        _progress.progress(f"resize {here.name}", size, shown) as advance,
    ):
        everything = listed(lazy(tree, where, advance), (), lists)
        for name, item in parts.items():
            inner = everything[name] if len(parts) > 1 else everything
            write_item(data / name, inner, item.custom)
        directories = {name: item.directory for name, item in parts.items()}
        by_one(lambda: copy_rest(there, data, directories))
    return here


def items(directories: Mapping[str, Path]) -> Mapping[str, Item]:
    """Returns what a checkpoint holds by directory; where there are several, paths begin so."""
    several = len(directories) > 1
    return {name: read_item(path, (name,) if several else ()) for name, path in directories.items()}


def whole(items: Mapping[str, Item]) -> Any:
    """Returns the tree of a checkpoint, with names of directories above where there are several."""
    trees = {name: item.tree for name, item in items.items()}
    return trees if len(trees) > 1 else next(iter(trees.values()))


def _direction(grows: bool | None, states: Mapping[Key, Resizing]) -> bool:
    """Whether parameters and states are the small model's."""
    ways = {} if grows is None else {"the parameters are": grows}
    for place, resizing in states.items():
        if any(None in both for both in resizing.places.values()):
            ways[f"{_tree.name(place)!r} is"] = resizing.grows
    if len(set(ways.values())) > 1:
        small, big = (
            ", ".join(what for what, way in ways.items() if way is which) for which in (True, False)
        )
        raise ValueError(
            f"this checkpoint does not fit the plan: {small} of its small model, and {big} of its "
            "big one. Fix: a checkpoint of one model."
        )
    return next(iter(ways.values()), True)


def _work(
    plan: Plan, grows: bool, symmetry: str | None, amount: float | None, key: jax.Array | None
) -> list[Work]:
    if grows:
        return list(_grow.work(plan, symmetry, amount, key))
    if symmetry is not None:
        raise ValueError(
            f"symmetry={symmetry!r} tells new copies apart, and this checkpoint is of the plan's "
            "big model, which is shrunk. Fix: leave it out."
        )
    return list(_shrink.work(plan))


def _resized(found: Found, states: Mapping[Key, Resizing], work: list[Work], grows: bool) -> Any:
    """The tree of the target, of dicts."""
    tree = found.tree
    for place in found.params:
        of = "the parameters hold" if grows else ""
        tree = replaced(tree, place, partial(with_parameters, work=work, of=of))
    for place, resizing in states.items():
        tree = replaced(tree, place, partial(with_state, resizing=replace(resizing, grows=grows)))
    return as_made(tree)
