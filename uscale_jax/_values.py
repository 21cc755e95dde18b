"""scale_params: W' = k·W on a whole parameter tree, as one compiled program."""

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax, _tree
from uscale_jax._types import Factor, Key, Tree, Where

# No trained parameter is larger than this, nor its reciprocal smaller: a leaf is looked at for
# overflow (which costs one more pass over it) only where a parameter below it could overflow.
_PLAUSIBLE = 2.0**80


class _Job(NamedTuple):
    """One leaf to scale: its place in the flat tree, its factor, and whether to look at it."""

    place: int
    factor: Factor
    checked: bool


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
        every leaf must be covered.
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
      Positive homogeneity and what scaling does to outputs, gradients and learning rates: Yang et
      al., *Tensor Programs V*, 2022 (arXiv:2203.03466), appendix on parametrizations.
    """
    leaves, treedef = jax.tree.flatten(params)
    jobs = _plan(params, leaves, k, where, exponents)
    scaled = list(leaves)
    peaks: dict[int, jax.Array] = {}
    for group in _by_device(leaves, jobs):
        out, looked_at = _run(leaves, group)
        for job, leaf in zip(group, out, strict=True):
            scaled[job.place] = leaf
        peaks.update(zip([job.place for job in group if job.checked], looked_at, strict=True))
    if peaks:
        _refuse_lost(params, leaves, jobs, peaks)
    return jax.tree.unflatten(treedef, scaled)


def _plan(
    params: Tree, leaves: Sequence[Any], k: Any, where: Where | None, exponents: Any
) -> list[_Job]:
    """Which leaves are multiplied by what; everything that can be refused is refused here."""
    if not all(map(_is_array, leaves)):
        _refuse(params, _is_array, TypeError, _NOT_ARRAYS)
    if not all(map(_keeps_dtype, leaves)):
        _refuse(params, _keeps_dtype, ValueError, _NOT_64_BIT)
    simple = jax.tree_util.treedef_is_leaf(jax.tree.structure(k)) and k is not None
    keys = None if simple and where is None and exponents is None else _keys(params)
    factors = _factors_per_leaf(params, keys, len(leaves), k, exponents)
    chosen = [i for i, leaf in enumerate(leaves) if _factors.is_scaled(leaf)]
    if where is not None:
        chosen = _select(leaves, keys or [], chosen, where)
    return [
        _Job(i, factors[i], _needs_look(leaves[i], factors[i]))
        for i in chosen
        if not isinstance(leaves[i], jax.ShapeDtypeStruct)
    ]


def _keys(params: Tree) -> list[Key]:
    return _tree.flatten_named(params)[0]


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct)


def _keeps_dtype(leaf: Any) -> bool:
    """Whether JAX would hold a NumPy leaf in its own dtype (64 bits only where enabled)."""
    if not isinstance(leaf, np.ndarray | np.generic) or not _factors.is_scaled(leaf):
        return True
    return bool(jax.dtypes.canonicalize_dtype(leaf.dtype) == leaf.dtype)


_NOT_ARRAYS = (
    "Expected: JAX or NumPy arrays or jax.ShapeDtypeStruct. Fix: wrap numbers in jnp.asarray, "
    "keep everything else out of the tree (flax: nnx.state(model, nnx.Param))."
)
_NOT_64_BIT = (
    "Expected: a dtype JAX holds as it is; 64 bits are switched off. Fix: "
    "jax.config.update('jax_enable_x64', True), or leaf.astype(np.float32)."
)


def _refuse(
    params: Tree, accepts: Callable[[Any], bool], error: type[Exception], advice: str
) -> NoReturn:
    keys, leaves, _ = _tree.flatten_named(params)
    bad = [
        f"  leaf {_tree.name(key)!r}: got {_tree.describe(leaf)}"
        for key, leaf in zip(keys, leaves, strict=True)
        if not accepts(leaf)
    ]
    raise error("\n".join(["scale_params cannot take this tree.", *bad[:8], advice]))


def _factors_per_leaf(
    params: Tree, keys: Sequence[Key] | None, n: int, k: Any, exponents: Any
) -> list[Factor]:
    if keys is None:
        return [_factors.check_factor(k)] * n
    ks = _tree.broadcast_prefix(k, params, keys, what="k")
    checked = {id(one): _check_entry(one, key, k) for one, key in zip(ks, keys, strict=True)}
    factors = [checked[id(one)] for one in ks]
    if exponents is None:
        return factors
    powers = _tree.broadcast_prefix(exponents, params, keys, what="exponents")
    return [
        _factors.check_factor(_factors.power(f, _check_exponent(e, key)), f"k**{e}")
        for f, e, key in zip(factors, powers, keys, strict=True)
    ]


def _check_entry(one: Any, key: Key, k: Any) -> Factor:
    return _factors.check_factor(one, "k" if one is k else f"k (for leaf {_tree.name(key)!r})")


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


def _needs_look(leaf: Any, factor: Factor) -> bool:
    """Whether to look at a leaf's values: they are there, and the factor could lose them."""
    if _jax.is_traced(leaf) or not isinstance(factor, float):
        return False
    return _is_extreme(factor, leaf.dtype)


@lru_cache(maxsize=1024)
def _is_extreme(factor: float, dtype: Any) -> bool:
    """Whether plausible values of this dtype could overflow, or all vanish, under this factor."""
    info = jnp.finfo(dtype)
    return float(info.max) / factor < _PLAUSIBLE or factor / float(info.tiny) < _PLAUSIBLE


def _by_device(leaves: Sequence[Any], jobs: Sequence[_Job]) -> list[list[_Job]]:
    """One group per set of devices: a program runs on one set only."""
    groups: dict[Any, list[_Job]] = {}
    for job in jobs:
        leaf = leaves[job.place]
        placed = isinstance(leaf, jax.Array) and not _jax.is_traced(leaf) and leaf.committed
        devices = frozenset(leaf.sharding.device_set) if placed else None
        groups.setdefault(devices, []).append(job)
    free = groups.pop(None, [])
    if not groups:
        return [free] if free else []
    next(iter(groups.values())).extend(free)
    return list(groups.values())


def _run(leaves: Sequence[Any], jobs: Sequence[_Job]) -> Any:
    values = {_identity(job.factor): job.factor for job in jobs}
    place = {identity: n for n, identity in enumerate(values)}
    return _scale_leaves(
        tuple(leaves[job.place] for job in jobs),
        tuple(values.values()),
        which=tuple(place[_identity(job.factor)] for job in jobs),
        checked=tuple(job.checked for job in jobs),
    )


def _identity(factor: Factor) -> float | str:
    """Equal floats are one argument of the compiled program; traced factors are themselves."""
    return factor if isinstance(factor, float) else f"traced {id(factor)}"


@partial(jax.jit, static_argnames=("which", "checked"))
def _scale_leaves(
    leaves: tuple[jax.Array, ...],
    factors: tuple[Factor, ...],
    *,
    which: tuple[int, ...],
    checked: tuple[bool, ...],
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """The scaled leaves, and the largest finite magnitude of the ones to look at."""
    scaled = tuple(_factors.multiply(x, factors[n]) for x, n in zip(leaves, which, strict=True))
    looked_at = (x for x, look in zip(leaves, checked, strict=True) if look)
    return scaled, tuple(map(_largest_finite, looked_at))


def _largest_finite(x: jax.Array) -> jax.Array:
    magnitude = jnp.abs(x.astype(_factors.compute_dtype(x.dtype)))
    return jnp.max(magnitude, initial=0, where=jnp.isfinite(magnitude))


def _complaint(leaf: Any, factor: float, peak: float) -> str | None:
    """What is wrong with factor·leaf, given its largest magnitude; rounding is monotone, so that
    element alone tells whether anything overflows or everything vanishes.
    """
    info, largest = jnp.finfo(leaf.dtype), peak * factor
    top = float(info.max)
    half_step = 2.0 ** np.floor(np.log2(top)) * float(info.eps) / 2
    with np.errstate(over="ignore"):
        rounded = float(np.asarray(largest).astype(info.dtype))
    if not np.isfinite(rounded) or largest > top + half_step:
        return (
            f"overflows: its largest |k·W| is {largest:.4g}, {leaf.dtype} ends at {top:.4g}; "
            f"expected k ≤ {top / peak:.4g}"
        )
    if peak > 0 and rounded == 0:
        least = float(info.smallest_subnormal)
        return (
            f"vanishes: its largest |k·W| is {largest:.4g}, which rounds to zero; "
            f"expected k ≥ {least / peak:.4g}"
        )
    return None


def _refuse_lost(
    params: Tree, leaves: Sequence[Any], jobs: Sequence[_Job], peaks: Mapping[int, jax.Array]
) -> None:
    """Raises if a leaf that was looked at lost its values; ``peaks`` are their magnitudes."""
    bad = {
        job.place: f"{_tree.describe(leaves[job.place])} × {job.factor:g} {why}"
        for job in jobs
        if job.place in peaks
        and (why := _complaint(leaves[job.place], job.factor, float(peaks[job.place])))
    }
    if not bad:
        return
    keys = _keys(params)
    raise ValueError(
        "\n".join(
            ["scale_params would lose values."]
            + [f"  leaf {_tree.name(keys[i])!r}: {words}" for i, words in list(bad.items())[:8]]
            + ["Fix: a factor in that range, or a wider dtype: leaf.astype(jnp.float32)."]
        )
    )
