"""grow: the parameters of a larger model from those of a smaller one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax, _parts, _symmetry, _tree
from uscale_jax._parts import Way
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._symmetry import AMOUNTS, Dimensions
from uscale_jax._types import Key, Tree
from uscale_jax._work import Work, at_place, compiled, placed, placements, resized_sharding
from uscale_jax.trace.units import NEW_MEAN


def grow(
    params: Tree,
    plan: Plan,
    *,
    symmetry: str | None = None,
    amount: float | None = None,
    key: jax.Array | None = None,
    verify: bool = True,
    shardings: Any = None,
) -> Tree:
    r"""Returns the parameters of the big model of a plan, the same function as the small one.

    .. math:: W' = m\,(c + W)[\mathrm{maps}] - c

    Copies of a unit are equal at first and, with an optimizer that treats equal things equally,
    stay equal.  ``symmetry`` makes them differ without changing the function:

    =================  =====================================================================
    ``"noise"``        what reads the copies gets normal noise that sums to 0 over the copies
                       of every unit; ``amount`` is its RMS relative to the leaf's (1)
    ``"uneven"``       what reads the copies is split unevenly: a share ``amount`` (1/3) for the
                       first copy, the rest in equal parts for the others
    ``"zero_fan_out"`` new units are fresh (normal, ``amount`` times the leaf's RMS) and what
                       reads them is 0
    ``"paired"``       new units come in fresh pairs of equal ones that are read with opposite
                       signs; one left over is read with 0
    =================  =====================================================================

    The last two concern the axes all of whose readers are parameters (MLP width, heads, channels
    between two layers); units of a normalised axis stay copies.

    Args:
      params: the small model's parameters.  Under ``jax.jit`` they may be traced.
      plan: what :func:`plan` returned, or ``Plan.from_json``.
      symmetry: one of the ways above, or None to keep copies equal.
      amount: how much of it.
      key: a ``jax.random.key`` for the random ones.
      verify: run both models and compare (:func:`verify`).  Done where the plan knows its models
        (one read from JSON does not), the plan is exact, and parameters are not traced.
      shardings: where leaves of the result are to be: a ``NamedSharding``, a tree prefix of them,
        or a function of a leaf's name and its ``jax.ShapeDtypeStruct`` (None for the default).  By
        default a leaf has the mesh and the spec of the one it is made from.

    Returns:
      A tree of the big model's parameters: of the small tree's type, or of the big one's where
      layers are added.  Leaves keep dtype and weak type; those narrower than float32 are computed
      in float32 and rounded once.  Values stay on their devices, and move between them only where
      a copy lies in another part of a dimension than what it copies.

    Raises:
      TypeError: a sharding is no ``NamedSharding``.
      ValueError: the parameters are not those of the plan's small model (names, shapes, kinds of
        dtype), or hold NaN; ``symmetry`` is none of the above or needs a key; sizes cannot be cut
        into as many parts as shardings say; the verification fails.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> small = {"up": normal(0, 5, 7), "down": normal(1, 7, 3)}
      >>> big = {"up": normal(0, 5, 11), "down": normal(1, 11, 3)}
      >>> x = normal(2, 2, 5)
      >>> plan = us.plan(apply, small, apply, big, x)
      >>> grown = us.grow(small, plan, symmetry="noise", key=jax.random.key(3))
      >>> grown["up"].shape, bool(jnp.allclose(apply(grown, x), apply(small, x), atol=1e-5))
      ((5, 11), True)

    References:
      Chen et al., *Net2Net*, 2016 (arXiv:1511.05641), Eq. 3 and 4; uneven splits: Wang et al.,
      *LEMON*, 2023 (arXiv:2310.07999); noise that sums to 0: Samragh et al., *Scaling smart*
      (HyperCloning), 2024 (arXiv:2409.12903); pairs: Yuan et al., 2023 (arXiv:2306.12700); zero
      fan-out: Gesmundo & Maile, *Composable function-preserving expansions*, 2023
      (arXiv:2308.06103).
    """
    keys, leaves, treedef = _tree.flatten_named(params)
    sources = matched(plan, keys, leaves)
    makings = list(work(plan, symmetry, amount, key))
    given = [sources[each.source] for each in makings]
    places = placements(makings, given, shardings, "grow")
    _check_finite(keys, leaves)
    grown = [each.run(x, place) for each, x, place in zip(makings, given, places, strict=True)]
    same = [leaf.key for leaf in plan.leaves.values()] == keys
    tree = jax.tree.unflatten(treedef, grown) if same else plan.unflatten(grown)
    if verify and plan.models is not None and plan.exact and not any(map(_jax.is_traced, leaves)):
        from uscale_jax._verify import verify as check

        check(plan, plan.models.small, params, plan.models.big, tree, *plan.models.inputs)
    return tree


def work(
    plan: Plan, symmetry: str | None, amount: float | None, key: jax.Array | None
) -> Iterator[Work]:
    """Yields how every leaf of the big model is made, in the order of the plan.

    Raises:
      ValueError: ``symmetry`` is none of those there are, or needs a key.
    """
    _check_symmetry(symmetry, key)
    for i, leaf in enumerate(plan.leaves.values()):
        own = None if key is None else jax.random.fold_in(key, i)
        run = partial(_grow, plan=leaf, symmetry=symmetry, amount=amount, key=own)
        yield Work(leaf.key, leaf.source, leaf.big, run)


def matched(plan: Plan, keys: Sequence[Key], leaves: Sequence[Any]) -> Mapping[Key, Any]:
    """Returns the small model's leaves by key.

    Raises:
      ValueError: they are not what the plan was made for.
    """
    wanted = {leaf.source: leaf for leaf in plan.leaves.values()}
    given = dict(zip(keys, leaves, strict=True))
    lines = [f"  it has no {_tree.name(key)!r}" for key in wanted if key not in given][:8]
    lines += [f"  {_tree.name(key)!r} is not in the plan" for key in given if key not in wanted][:8]
    for key, leaf in wanted.items():
        if key in given and (why := _misfit(given[key], leaf)):
            lines.append(f"  {_tree.name(key)!r} {why}")
    if not lines:
        return given
    big = {leaf.key: leaf.big for leaf in plan.leaves.values()}
    is_big = all(key in big and np.shape(x) == big[key] for key, x in given.items())
    first = "these are the big model's parameters" if is_big else "this tree does not fit the plan"
    advice = (
        "Expected: the parameters of the plan's small model. Fix: pass those, or make a plan for "
        "these."
    )
    raise ValueError("\n".join([f"{first}.", *lines[:12], advice]))


def _misfit(leaf: Any, plan: LeafPlan) -> str | None:
    if not (hasattr(leaf, "shape") and hasattr(leaf, "dtype")):
        return f"is {_tree.describe(leaf)}, not an array"
    if tuple(leaf.shape) != plan.small:
        return f"is {_tree.describe(leaf)}, the plan is for shape {plan.small}"
    if _factors.is_scaled(leaf) != plan.floating:
        return f"is {_tree.describe(leaf)}, the plan is for {plan.dtype}"
    return None


def _check_symmetry(symmetry: str | None, key: jax.Array | None) -> None:
    if symmetry is None:
        return
    if symmetry not in AMOUNTS:
        raise ValueError(
            f"symmetry={symmetry!r} is none of {', '.join(map(repr, AMOUNTS))}, or None."
        )
    if key is None and symmetry != "uneven":
        raise ValueError(
            f"symmetry={symmetry!r} draws random numbers and needs a key. Fix: pass "
            "key=jax.random.key(0)."
        )


def _check_finite(keys: Sequence[Key], leaves: Sequence[Any]) -> None:
    """Refuses parameters with NaN before they are copied all over a larger model."""
    floating = [
        (key, leaf)
        for key, leaf in zip(keys, leaves, strict=True)
        if not _jax.is_traced(leaf) and _factors.is_scaled(leaf)
    ]
    flags = jax.device_get([has_nan(leaf) for _, leaf in floating])
    bad = [_tree.name(key) for (key, _), flag in zip(floating, flags, strict=True) if flag]
    if bad:
        raise ValueError(
            f"the parameters hold NaN: {', '.join(bad[:8])}. Expected: trained, finite values. "
            "Fix: go back to a checkpoint from before the divergence."
        )


@jax.jit
def has_nan(leaf: jax.Array) -> jax.Array:
    """Returns whether there is a NaN in an array."""
    return jnp.any(jnp.isnan(leaf))


def _grow(
    leaf: Any,
    sharding: jax.sharding.NamedSharding | None = None,
    *,
    plan: LeafPlan,
    symmetry: str | None,
    amount: float | None,
    key: jax.Array | None,
) -> Any:
    """One leaf; leaves of equal shapes share a compiled program, whatever their maps."""
    place = sharding or resized_sharding(leaf, plan.big)
    leaf = placed(leaf, place)
    if not plan.floating and all(old is None for old in plan.maps):
        return at_place(leaf, sharding)
    which = Dimensions({}, {}) if symmetry is None else _symmetry.dimensions(plan, symmetry)
    kind = symmetry if which.readers or which.makers else None
    maps, ways = _parts.to_grow(leaf, plan.maps, plan.averages, place)
    run = _program(place, kind, plan.zero, plan.big, plan.floating, ways)
    chosen = AMOUNTS.get(symmetry or "", 0.0) if amount is None else amount
    return run(leaf, maps, plan.averages, plan.factors, plan.shift, which, chosen, key)


@cache
def _program(
    sharding: jax.sharding.NamedSharding | None,
    kind: str | None,
    zero: bool,
    shape: tuple[int, ...],
    scaled: bool,
    ways: tuple[Way, ...],
) -> Callable[..., Any]:
    """The compiled program for leaves of a kind."""
    run = partial(_grown, kind=kind, zero=zero, shape=shape, scaled=scaled, ways=ways)
    return compiled(run, sharding)


def _grown(
    leaf: jax.Array,
    maps: tuple[Any, ...],
    averages: tuple[tuple[Any, ...], ...],
    factors: tuple[Any, ...],
    shift: Any,
    which: Dimensions,
    amount: Any,
    key: jax.Array | None,
    *,
    kind: str | None,
    zero: bool,
    shape: tuple[int, ...],
    scaled: bool,
    ways: tuple[Way, ...],
) -> jax.Array:
    """One leaf of the big model."""
    if zero:
        return _jax.with_weak_type(jnp.zeros(shape, leaf.dtype), leaf)
    if not scaled:
        return taken(leaf, maps, ways=ways)
    wide = _factors.compute_dtype(leaf.dtype)
    constant = jnp.asarray(shift, wide)
    x = taken(leaf.astype(wide) + constant, maps, averages, ways)
    for factor in factors:
        x = x * jnp.asarray(factor).astype(wide)
    if kind is not None:
        given = jax.random.key(0) if key is None else key
        x = _symmetry.apply(kind, x, which, jnp.asarray(amount, wide), given)
    return _jax.with_weak_type((x - constant).astype(leaf.dtype), leaf)


def taken(
    x: jax.Array,
    maps: Sequence[Any],
    averages: Sequence[Sequence[Any]] = (),
    ways: Sequence[Way] = (),
) -> jax.Array:
    """Takes every place of the big leaf from the small one; new places are 0, or means."""
    for axis, (old, way) in enumerate(zip(maps, ways, strict=True)):
        if old is None and not way.repeat:
            continue
        run = partial(_along, axis=axis)
        if way.repeat:
            run = partial(_repeated, axis=axis, count=way.repeat)
        vectors = () if way.repeat else (old,)
        if way.cut is not None:
            x = _parts.by_part(way.cut, axis, run, x, *vectors)
            continue
        along = run(x, *vectors)
        sets = averages[axis] if averages else ()
        if sets and _factors.is_scaled(x):
            mean = jnp.take(_means(x, sets, axis), NEW_MEAN - old, axis=axis, mode="clip")
            along = jnp.where(_broadcast(old <= NEW_MEAN, x, axis), mean, along)
        x = along
    return x


def _repeated(x: jax.Array, *, axis: int, count: int) -> jax.Array:
    """Copies every unit, side by side: twice as fast as looking places up."""
    before, size, after = x.shape[:axis], x.shape[axis], x.shape[axis + 1 :]
    wide = jnp.broadcast_to(jnp.expand_dims(x, axis + 1), (*before, size, count, *after))
    return wide.reshape(*before, size * count, *after)


def _along(x: jax.Array, old: Any, *, axis: int) -> jax.Array:
    """Takes places along a dimension; new ones are 0."""
    found = jnp.take(x, jnp.maximum(old, 0), axis=axis, mode="clip")
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # random keys have no zero
        return found
    return jnp.where(_broadcast(old >= 0, x, axis), found, jnp.zeros((), x.dtype))


def _broadcast(vector: Any, x: jax.Array, axis: int) -> Any:
    return vector.reshape([-1 if i == axis else 1 for i in range(x.ndim)])


def _means(x: jax.Array, sets: Sequence[Any], axis: int) -> jax.Array:
    """The means over sets of places along an axis, all sets of one size at once."""
    sizes = [len(places) for places in sets]
    found, order = [], []
    for size in dict.fromkeys(sizes):
        order += [number for number, own in enumerate(sizes) if own == size]
        alike = jnp.stack([places for places in sets if len(places) == size])
        found.append(jnp.mean(jnp.take(x, alike, axis=axis), axis=axis + 1))
    where = np.argsort(np.asarray(order))
    return jnp.take(jnp.concatenate(found, axis=axis), where, axis=axis)
