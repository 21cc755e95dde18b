"""scale_params: W' = k·W on a whole parameter tree, as one compiled program."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal

import jax
import numpy as np

from uscale_jax import _factors, _jax, _overflow, _tree
from uscale_jax._types import Factor, Key, Tree, Where


def scale_params(
    params: Tree, k: Any, *, where: Where | None = None, exponents: Any = None
) -> Tree:
    r"""Returns ``params`` with every floating leaf multiplied by ``k``.

    .. math:: W' = k\,W \qquad\text{or, with exponents,}\qquad W'_p = k^{e_p}\,W_p

    The values change and so does the function; :func:`compensate` is the way back for homogeneous
    models.  Integer, boolean and PRNG-key leaves pass through.  Leaves narrower than float32 are
    multiplied in float32 and rounded once.  The tree keeps its type (dict, ``FrozenDict``,
    ``nnx.State``, boxes and all), every leaf its dtype, weak type and sharding.  The whole tree
    is one compiled program, which other values of ``k`` reuse.

    Args:
      params: any pytree of JAX or NumPy arrays, or of ``jax.ShapeDtypeStruct``, which come back
        as they are because scaling changes no shape.
      k: a positive finite scalar (Python, NumPy or JAX; traced values are allowed), or a tree
        prefix of them.  A prefix fits by name, so a plain dict may describe an ``nnx.State``;
        every leaf must be covered.  In a tree, a NumPy array with as many dimensions as its leaf,
        of sizes that broadcast, scales parts of the leaf unlike: ``Plan.factors`` of fused kernels.
      where: chooses the leaves to scale, ``where(name, leaf) -> bool`` with names such as
        ``'params/Dense_0/kernel'``; all floating leaves by default.
      exponents: a real number, or a tree prefix of them: the power of ``k`` each leaf takes, 1 by
        default.  :func:`homogeneous_exponents` makes such a tree.

    Returns:
      A tree of the same structure, shapes, dtypes and shardings.

    Raises:
      TypeError: ``k`` is no real number, or a leaf is no array.
      ValueError: ``k`` is zero, negative, NaN, infinite or not a scalar; a prefix does not fit;
        ``where`` selects no leaf; or, where values are concrete, a leaf would overflow its dtype
        or lose all its values to underflow.  float16, float8 and float4 leaves are always looked
        at; wider ones when ``k`` is extreme.

    Example:
      >>> import jax.numpy as jnp
      >>> import uscale_jax as us
      >>> params = {"kernel": jnp.array([[1.0, -2.0, 3.0]]), "steps": jnp.array(7)}
      >>> us.scale_params(params, 0.5)["kernel"]
      Array([[ 0.5, -1. ,  1.5]], dtype=float32)
      >>> us.scale_params(params, {"kernel": 2.0, "steps": 1.0})["kernel"]
      Array([[ 2., -4.,  6.]], dtype=float32)

      In place, with the buffers of ``params`` reused:

      >>> double = jax.jit(lambda p: us.scale_params(p, 2.0), donate_argnums=0)
      >>> params = double(params)

    References:
      The symmetry between multipliers, initial scale and learning rate: *µnit Scaling*, 2025
      (arXiv:2502.05967), Eq. 16.
    """
    leaves, treedef = jax.tree.flatten(params)
    factors, chosen = _plan(params, leaves, k, where, exponents)
    arrays = {i: factors[i] for i in chosen if _is_array(factors[i])}
    chosen = [i for i in chosen if i not in arrays]
    scaled = [
        _by_element(x, arrays[i], params, i) if i in arrays else x for i, x in enumerate(leaves)
    ]
    lost: dict[int, str] = {}
    for places in _by_device(leaves, chosen):
        out, complaints = _run(_at(places, leaves), _at(places, factors))
        for i, leaf in zip(places, out, strict=True):
            scaled[i] = leaf
        lost |= {places[n]: why for n, why in complaints.items()}
    if lost:
        _overflow.refuse(_keys(params), leaves, factors, lost)
    return jax.tree.unflatten(treedef, scaled)


def _at(places: Sequence[int], values: Sequence[Any]) -> Sequence[Any]:
    return values if len(places) == len(values) else [values[i] for i in places]


_Role = Literal["scaled", "passes", "no array", "64 bit"]


def _roles(params: Tree, leaves: Sequence[Any]) -> list[_Role]:
    """What happens to each leaf, which its type and dtype decide; refuses what cannot be taken."""
    kinds = [*zip(map(type, leaves), _jax.dtypes(leaves), strict=True)]
    role = {kind: _role(leaf) for kind, leaf in dict(zip(kinds, leaves, strict=True)).items()}
    for bad, (error, advice) in _REFUSED.items():
        if bad in role.values():
            raise error(_refusal(params, [role[kind] == bad for kind in kinds], advice))
    return [*map(role.__getitem__, kinds)]


def _role(leaf: Any) -> _Role:
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return "passes"
    if not isinstance(leaf, jax.Array | np.ndarray | np.generic):
        return "no array"
    if not _factors.is_scaled(leaf):
        return "passes"
    return "scaled" if jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype else "64 bit"


_NOT_ARRAYS = (
    "Expected: JAX or NumPy arrays or jax.ShapeDtypeStruct. Fix: wrap numbers in jnp.asarray, "
    "keep everything else out of the tree (flax: nnx.state(model, nnx.Param))."
)
_NOT_64_BIT = (
    "Expected: a dtype JAX holds as it is; 64 bits are switched off. Fix: "
    "jax.config.update('jax_enable_x64', True), or leaf.astype(np.float32)."
)
_REFUSED: dict[_Role, tuple[type[Exception], str]] = {
    "no array": (TypeError, _NOT_ARRAYS),
    "64 bit": (ValueError, _NOT_64_BIT),
}


def _refusal(params: Tree, bad: Sequence[bool], advice: str) -> str:
    keys, leaves, _ = _tree.flatten_named(params)
    lines = [
        f"  leaf {_tree.name(key)!r}: got {_tree.describe(leaf)}"
        for key, leaf, refused in zip(keys, leaves, bad, strict=True)
        if refused
    ]
    return "\n".join(["scale_params cannot take this tree.", *lines[:8], advice])


def _plan(
    params: Tree,
    leaves: Sequence[Any],
    k: Any,
    where: Where | None,
    exponents: Any,
) -> tuple[list[Factor], list[int]]:
    """The factor of every leaf, and the places of those that take it."""
    roles = _roles(params, leaves)
    simple = jax.tree_util.treedef_is_leaf(jax.tree.structure(k)) and k is not None
    keys = None if simple and where is None and exponents is None else _keys(params)
    factors = _factors_per_leaf(params, keys, len(leaves), k, exponents)
    chosen = [i for i, role in enumerate(roles) if role == "scaled"]
    if where is None:
        return factors, chosen
    floating = [i for i, leaf in enumerate(leaves) if _factors.is_scaled(leaf)]
    selected = set(_select(leaves, keys or [], floating, where))
    return factors, [i for i in chosen if i in selected]


def _keys(params: Tree) -> list[Key]:
    return _tree.flatten_named(params)[0]


def _factors_per_leaf(
    params: Tree, keys: Sequence[Key] | None, n: int, k: Any, exponents: Any
) -> list[Factor]:
    if keys is None:
        return [_factors.check_factor(k)] * n
    ks = _tree.broadcast_prefix(k, params, keys, what="k")
    shapes = [np.shape(leaf) if hasattr(leaf, "shape") else () for leaf in jax.tree.leaves(params)]
    checked = {
        id(one): _check_entry(one, key, k, shape)
        for one, key, shape in zip(ks, keys, shapes, strict=True)
    }
    factors = [checked[id(one)] for one in ks]
    if exponents is None:
        return factors
    if any(map(_is_array, factors)):
        raise ValueError(
            "exponents with an array as k. Expected: one number a leaf where there are exponents. "
            "Fix: raise the array to its power, k=array**exponent."
        )
    powers = _tree.broadcast_prefix(exponents, params, keys, what="exponents")
    return [
        _factors.check_factor(_factors.power(f, _check_exponent(e, key)), f"k**{e}")
        for f, e, key in zip(factors, powers, keys, strict=True)
    ]


def _check_entry(one: Any, key: Key, k: Any, shape: tuple[int, ...]) -> Factor:
    what = "k" if one is k else f"k (for leaf {_tree.name(key)!r})"
    if one is not k and _is_array(one) and one.ndim == len(shape):
        for value in (one.min(), one.max()) if one.size else ():
            _factors.check_factor(value, what)
        if all(n in (1, size) for n, size in zip(one.shape, shape, strict=True)):
            return one
    return _factors.check_factor(one, what)


def _is_array(k: Any) -> bool:
    return isinstance(k, np.ndarray) and k.ndim > 0


def _by_element(leaf: Any, k: Any, params: Tree, place: int) -> jax.Array:
    """A leaf times an array."""
    scaled = _factors.multiply(jax.numpy.asarray(leaf), jax.numpy.asarray(k))
    if not _jax.is_traced(scaled) and scaled.size:
        (before, nonzero), (after, left) = (
            (int(jax.numpy.isfinite(x).sum()), int(jax.numpy.count_nonzero(x)))
            for x in (leaf, scaled)
        )
        if after < before or left < nonzero:
            keys, leaves = _keys(params), jax.tree.leaves(params)
            why = "overflows" if after < before else "vanishes in part"
            _overflow.refuse(keys, leaves, [float(k.max())] * len(leaves), {place: why})
    return scaled


def _check_exponent(exponent: Any, key: Key) -> float:
    if isinstance(exponent, int | float) and np.isfinite(exponent):
        return float(exponent)
    raise TypeError(
        f"exponents must be finite Python numbers, got {exponent!r} for leaf {_tree.name(key)!r}."
    )


def _select(
    leaves: Sequence[Any], keys: Sequence[Key], floating: Sequence[int], where: Where
) -> list[int]:
    chosen = [i for i in floating if _verdict(where, keys[i], leaves[i])]
    if chosen:
        return chosen
    shown = ", ".join(repr(_tree.name(keys[i])) for i in floating[:5])
    raise ValueError(
        f"where selects none of the {len(floating)} floating leaves, so nothing would be scaled. "
        f"The leaves are named {shown}{', ...' if len(floating) > 5 else ''}. "
        f"Fix: test for these names, or leave where out to scale all."
    )


def _verdict(where: Where, key: Key, leaf: Any) -> bool:
    answer = where("/".join(key), leaf)
    if isinstance(answer, bool | np.bool_):
        return bool(answer)
    raise TypeError(
        f"where must return a Python bool, got {answer!r} for leaf {_tree.name(key)!r}. "
        f"Fix: decide by name, shape and dtype, not by values."
    )


def _by_device(leaves: Sequence[Any], chosen: Sequence[int]) -> list[list[int]]:
    """The chosen places, one group per set of devices: a program runs on one set only."""
    if jax.device_count() == 1:
        return [list(chosen)] if chosen else []
    groups: dict[Any, list[int]] = {}
    for i in chosen:
        groups.setdefault(_jax.committed_devices(leaves[i]), []).append(i)
    free = groups.pop(None, [])
    if not groups:
        return [free] if free else []
    next(iter(groups.values())).extend(free)
    return list(groups.values())


def _run(leaves: Sequence[Any], factors: Sequence[Factor]) -> tuple[Any, dict[int, str]]:
    """The scaled leaves, and what is wrong with those that lost their values, by place."""
    objects = dict(zip(map(id, factors), factors, strict=True)).values()
    values = {_identity(factor): factor for factor in objects}
    place = {identity: n for n, identity in enumerate(values)}
    one = len(values) == 1
    traced = any(map(_jax.is_traced, _one_of_each_type((*leaves, *values.values()))))
    looked_at = () if traced else _overflow.places_to_check(_jax.dtypes(leaves), factors)
    out, peaks = _scale_leaves(
        tuple(leaves),
        tuple(values.values()),
        which=None if one else tuple(place[_identity(factor)] for factor in factors),
        looked_at=looked_at,
    )
    if any(map(_jax.is_traced, peaks)):  # constants of somebody's jit: their values are known
        with _jax.concretely():
            peaks = tuple(_overflow.largest_finite(leaves[n]) for n in looked_at)
    pairs = zip(looked_at, peaks, strict=True)
    found = {n: _overflow.complaint(leaves[n].dtype, factors[n], float(peak)) for n, peak in pairs}
    return out, {n: why for n, why in found.items() if why}


def _identity(factor: Factor) -> float | str:
    """Equal floats are one argument of the compiled program; traced factors are themselves."""
    return factor if isinstance(factor, float) else f"traced {id(factor)}"


def _one_of_each_type(values: Iterable[Any]) -> Iterable[Any]:
    """Trees have thousands of leaves of one type: asking each costs more than scaling it."""
    return {type(value): value for value in values}.values()


@partial(jax.jit, static_argnames=("which", "looked_at"))
def _scale_leaves(
    leaves: tuple[jax.Array, ...],
    factors: tuple[Factor, ...],
    *,
    which: tuple[int, ...] | None,
    looked_at: tuple[int, ...],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The scaled leaves, and the largest finite magnitude of the ones to look at.

    ``which`` gives the place of each leaf's factor in ``factors``, None if there is only one.
    """
    places = which or (0,) * len(leaves)
    scaled = tuple(_factors.multiply(x, factors[n]) for x, n in zip(leaves, places, strict=True))
    return scaled, tuple(_overflow.largest_finite(leaves[n]) for n in looked_at)
