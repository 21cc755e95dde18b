"""shrink: the parameters of the small model of a plan from those of the big one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax, _tree
from uscale_jax._plan import Indices, LeafPlan, Plan
from uscale_jax._types import Key, Tree


def shrink(params: Tree, plan: Plan) -> Tree:
    r"""Returns the parameters of a plan's small model from those of its big one: grow undone.

    .. math:: W_j = \frac{1}{n_j} \sum_{i\,:\,\mathrm{maps}(i) = j} \frac{c + W'_i}{m_i} - c

    the mean over the copies of every unit for what makes units, the sum for what reads them.
    Exact on what :func:`grow` made, with any ``symmetry`` that only concerns readers ("noise",
    "uneven"), and as long as training keeps copies equal; bit for bit where factors and numbers of
    copies are powers of two.  Where copies have become different units it is the model of their
    means, a starting point.  New layers are dropped.

    Args:
      params: the big model's parameters; arrays, traced ones too.
      plan: the plan they were grown by.

    Returns:
      The small model's parameters: a tree of the type of ``params``, or of the small model's where
      layers are dropped.  Leaves keep dtype and weak type.

    Raises:
      ValueError: the parameters are not those of the plan's big model.

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
      The inverse of Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4.
    """
    keys, leaves, treedef = _tree.flatten_named(params)
    given = fitting(plan, keys, leaves)
    kept = {leaf.source: leaf for leaf in reversed(list(plan.leaves.values())) if not leaf.new}
    small = {source: _shrunk(given[leaf.key], leaf) for source, leaf in kept.items()}
    if set(small) == set(keys):
        return jax.tree.unflatten(treedef, [small[key] for key in keys])
    return plan.unflatten_small(small)


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
        if key in given and tuple(jnp.shape(given[key])) != leaf.big
    ]
    if lines:
        advice = (
            "Expected: the parameters of the plan's big model. Fix: pass those, or make a plan for "
            "these."
        )
        raise ValueError("\n".join(["this tree does not fit the plan.", *lines[:12], advice]))
    return given


def _shrunk(leaf: Any, plan: LeafPlan) -> Any:
    maps = plan.maps_of(new_layers=False)
    if not plan.floating:
        return _first_copies(leaf, maps)
    return _jitted(leaf, maps, (*plan.factors, *plan.copies), plan.shift, plan.small)


def _first_copies(leaf: Any, maps: Sequence[Indices | None]) -> Any:
    for axis, old in enumerate(maps):
        if old is not None:
            leaf = jnp.take(leaf, np.unique(old[old >= 0], return_index=True)[1], axis=axis)
    return leaf


def _summed(
    leaf: jax.Array,
    maps: tuple[Any, ...],
    divisors: tuple[Any, ...],
    shift: Any,
    shape: tuple[int, ...],
) -> jax.Array:
    wide = _factors.compute_dtype(leaf.dtype)
    constant = jnp.asarray(shift, wide)
    x = leaf.astype(wide) + constant
    for divisor in divisors:
        x = x / jnp.asarray(divisor).astype(wide)
    for axis, old in enumerate(maps):
        if old is not None:
            x = sum_copies(x, axis, old, shape[axis])
    return _jax.with_weak_type((x - constant).astype(leaf.dtype), leaf)


_jitted = jax.jit(_summed, static_argnames="shape")


def sum_copies(x: jax.Array, axis: int, old: Any, size: int) -> jax.Array:
    """Returns the sums over the copies of every unit along an axis; new places do not count."""
    where = jnp.where(old >= 0, old, size)  # out of range: dropped
    total = jax.ops.segment_sum(jnp.moveaxis(x, axis, 0), where, num_segments=size)
    return jnp.moveaxis(total, 0, axis)
