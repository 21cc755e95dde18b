"""shrink: the parameters of the small model of a plan from those of the big one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax, _parts, _tree
from uscale_jax._calibration import Calibration, big_leaves, with_leaves
from uscale_jax._importance import Importance
from uscale_jax._parts import Cut
from uscale_jax._plan import Indices, LeafPlan, Plan
from uscale_jax._reconstruct import refitted
from uscale_jax._select import Selected, chosen
from uscale_jax._types import Key, Tree
from uscale_jax._verify import verify
from uscale_jax._work import Work, at_place, compiled, placed, placements, resized_sharding

_UNCHANGED = 1e-3
"""Relative change of outputs below which a model is as usable as it was."""


class UnitScaleShrinkWarning(UserWarning):
    """A model was shrunk in a way that leaves a start for training, not a model to use."""


def shrink(
    params: Tree,
    plan: Plan,
    *,
    importance: Importance | Mapping[str, Any] | None = None,
    shardings: Any = None,
) -> Tree:
    r"""Returns the parameters of a plan's small model from those of its big one.

    **Without** ``importance`` it undoes :func:`grow`:

    .. math:: W_j = \frac{1}{n_j} \sum_{i\,:\,\mathrm{maps}(i) = j} \frac{c + W'_i}{m_i} - c

    the mean over the copies of every unit for what makes units, the sum for what reads them.
    Exact on what :func:`grow` made, with any ``symmetry`` that only concerns readers ("noise",
    "uneven"), and as long as training keeps copies equal; bit for bit where factors and numbers of
    copies are powers of two.  Where copies have become different units it is the model of their
    means, a starting point.  New layers are dropped.

    **With** ``importance`` the most important units and layers stay, as :func:`select` says, and
    nothing else is kept of the others; unless it was measured by ``"reconstruction"`` (or with
    ``refit=True``): then what reads the units that stay takes over what the others did,

    .. math:: \min_\Delta \lVert X_S \Delta - X_G W_G \rVert^2 + \lambda \lVert \Delta \rVert^2

    with X what it reads in the big model, S the units that stay, and G those that go.
    :func:`verify` measures what has changed.  Without data (``"magnitude"``, ``"random"``) the
    result is a start for training and no usable model, which a :class:`UnitScaleShrinkWarning`
    says with the measured change of the outputs; of numbers of your own nothing is known.

    Args:
      params: the big model's parameters; arrays, traced ones too (without refitting).
      plan: the plan they were grown by, or one between a smaller model and this one.
      importance: what :func:`importance` returned, or numbers per unit by axis.
      shardings: where leaves of the result are to be: a ``NamedSharding``, a tree prefix of them,
        or a function of a leaf's name and its ``jax.ShapeDtypeStruct`` (None for the default).  By
        default a leaf has the mesh and the spec of the one it is made from.

    Returns:
      The small model's parameters: a tree of the type of ``params``, or of the small model's where
      layers are dropped.  Leaves keep dtype and weak type.

    Raises:
      TypeError: a sharding is no ``NamedSharding``.
      ValueError: the parameters are not those of the plan's big model; the importance is of
        another plan, or lacks an axis; sizes cannot be cut into as many parts as shardings say.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> small = {"up": normal(0, 5, 7), "down": normal(1, 7, 3)}
      >>> big = {"up": normal(0, 5, 14), "down": normal(1, 14, 3)}
      >>> plan = us.plan(apply, small, apply, big, normal(2, 2, 5))
      >>> back = us.shrink(us.grow(small, plan), plan)
      >>> [bool(jnp.all(back[name] == small[name])) for name in small]
      [True, True]

    References:
      The inverse of Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4.  Least squares on
      what is kept: He et al., *Channel pruning*, 2017 (arXiv:1707.06168), Eq. 1.
    """
    if importance is None:
        return _mapped(params, plan, shardings)
    selected = chosen(plan, importance)
    refit = importance.calibration if isinstance(importance, Importance) else None
    merge = isinstance(importance, Importance) and importance.method == "merging"
    given = params if refit is None else _refitted(params, selected, refit, merge)
    small = _mapped(given, selected.plan, shardings)
    if isinstance(importance, Importance) and importance.data_free:
        _warn(small, params, selected, importance.method)
    return small


def _refitted(params: Tree, selected: Selected, calibration: Calibration, merge: bool) -> Tree:
    leaves = big_leaves(calibration.remade, params)
    changed = refitted(calibration, leaves, selected.units, merge)
    return with_leaves(calibration.remade, params, changed)


def _warn(small: Tree, params: Tree, selected: Selected, method: str) -> None:
    """Says what a choice without data is worth, measured where that can be done."""
    plan, models = selected.plan, selected.plan.models
    traced = any(map(_jax.is_traced, jax.tree.leaves((small, params))))
    change = ""
    if models is not None and not traced:
        found = verify(plan, models.small, small, models.big, params, *models.inputs)
        if found.error < _UNCHANGED:  # what went was equal to what stays, or read by nothing
            return
        change = f" On the plan's inputs outputs change by {found.error:.0%} of their size."
    warnings.warn(
        f"units were chosen by {method!r}, without data: what is left is a start for training, not "
        f"a usable model.{change} Fix: us.importance(..., method='reconstruction') with real "
        "batches, then train.",
        UnitScaleShrinkWarning,
        stacklevel=3,
    )


def _mapped(params: Tree, plan: Plan, shardings: Any) -> Tree:
    keys, leaves, treedef = _tree.flatten_named(params)
    sources = fitting(plan, keys, leaves)
    makings = list(work(plan))
    given = [sources[each.source] for each in makings]
    places = placements(makings, given, shardings, "shrink")
    small = {
        each.key: each.run(x, place) for each, x, place in zip(makings, given, places, strict=True)
    }
    if set(small) == set(keys):
        return jax.tree.unflatten(treedef, [small[key] for key in keys])
    return plan.unflatten_small(small)


def work(plan: Plan) -> Iterator[Work]:
    """Yields how every leaf of the small model is made, without importance."""
    kept = {leaf.source: leaf for leaf in reversed(list(plan.leaves.values())) if not leaf.new}
    for source, leaf in kept.items():
        yield Work(source, leaf.key, leaf.small, partial(_shrunk, plan=leaf))


def fitting(plan: Plan, keys: Sequence[Key], leaves: Sequence[Any]) -> Mapping[Key, Any]:
    """Returns the big model's leaves by key.

    Raises:
      ValueError: they are not what the plan makes.
    """
    wanted = {leaf.key: leaf for leaf in plan.leaves.values()}
    given = dict(zip(keys, leaves, strict=True))
    lines = [f"  it has no {_tree.name(key)!r}" for key in wanted if key not in given][:8]
    lines += [f"  {_tree.name(key)!r} is not in the plan" for key in given if key not in wanted][:8]
    lines += [
        f"  {_tree.name(key)!r} is {_tree.describe(given[key])}, the plan makes {leaf.big}"
        for key, leaf in wanted.items()
        if key in given and tuple(np.shape(given[key])) != leaf.big
    ]
    if lines:
        advice = (
            "Expected: the parameters of the plan's big model. Fix: pass those, or make a plan for "
            "these."
        )
        raise ValueError("\n".join(["this tree does not fit the plan.", *lines[:12], advice]))
    return given


def _shrunk(
    leaf: Any, sharding: jax.sharding.NamedSharding | None = None, *, plan: LeafPlan
) -> Any:
    maps = plan.maps_of(new_layers=False)
    place = sharding or resized_sharding(leaf, plan.small)
    leaf = placed(leaf, place)
    if not plan.floating:
        firsts = tuple(map(_first_copies, maps))
        still = all(first is None for first in firsts)
        return at_place(leaf, place) if still else _program(place, _taken, (), ())(leaf, firsts)
    cuts = _parts.to_shrink(leaf, maps, plan.small, place)
    maps = tuple(
        old if cut is None else _parts.local(old, size, _parts.parts(cut))
        for old, cut, size in zip(maps, cuts, plan.small, strict=True)
    )
    divisors = (*plan.factors, *plan.copies)
    return _program(place, _summed, plan.small, cuts)(leaf, maps, divisors, plan.shift)


def _first_copies(old: Indices | None) -> Indices | None:
    """The first place of every unit."""
    if old is None:
        return None
    there = np.flatnonzero(old >= 0)
    first: Indices = there[np.unique(old[there], return_index=True)[1]]
    return first


def _taken(
    leaf: jax.Array, firsts: tuple[Any, ...], *, shape: tuple[int, ...], cuts: tuple[Any, ...]
) -> jax.Array:
    del shape, cuts
    for axis, first in enumerate(firsts):
        leaf = leaf if first is None else jnp.take(leaf, first, axis=axis)
    return leaf


def _summed(
    leaf: jax.Array,
    maps: tuple[Any, ...],
    divisors: tuple[Any, ...],
    shift: Any,
    *,
    shape: tuple[int, ...],
    cuts: tuple[Cut | None, ...],
) -> jax.Array:
    wide = _factors.compute_dtype(leaf.dtype)
    constant = jnp.asarray(shift, wide)
    x = leaf.astype(wide) + constant
    for divisor in divisors:
        x = x / jnp.asarray(divisor).astype(wide)
    for axis, (old, cut) in enumerate(zip(maps, cuts, strict=True)):
        if old is not None and cut is None:
            x = sum_copies(x, axis, old, shape[axis])
        elif cut is not None:
            size = shape[axis] // _parts.parts(cut)
            own = partial(_sum_along, axis=axis, size=size)
            x = _parts.by_part(cut, axis, own, x, old)
    return _jax.with_weak_type((x - constant).astype(leaf.dtype), leaf)


@cache
def _program(
    sharding: jax.sharding.NamedSharding | None,
    run: Callable[..., Any],
    shape: tuple[int, ...],
    cuts: tuple[Cut | None, ...],
) -> Callable[..., Any]:
    """The compiled program, for results that are placed by JAX or as they shall be."""
    return compiled(partial(run, shape=shape, cuts=cuts), sharding)


def _sum_along(x: jax.Array, old: Any, *, axis: int, size: int) -> jax.Array:
    return sum_copies(x, axis, old, size)


def sum_copies(x: jax.Array, axis: int, old: Any, size: int) -> jax.Array:
    """Returns the sums over the copies of every unit along an axis; new places do not count."""
    where = jnp.where(old >= 0, old, size)  # out of range: dropped
    total = jax.ops.segment_sum(jnp.moveaxis(x, axis, 0), where, num_segments=size)
    return jnp.moveaxis(total, 0, axis)
