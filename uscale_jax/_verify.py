"""verify: runs the two models of a plan and compares what they return."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax
from uscale_jax._plan import Plan
from uscale_jax._types import Apply, Tree
from uscale_jax._work import compiled
from uscale_jax.trace.tracing import output_names

_CHEAP = 20_000_000
_DOUBLE_FLOOR = 1e-12
_FLOOR = 16
"""In units of the rounding of one number, how far outputs may be apart whatever the model."""
_AMPLIFIED = 16
"""How many times as far as parameters rounded differently would move them."""


class Verification(NamedTuple):
    """What comparing two models gave; the numbers are relative to the size of the outputs."""

    error: float
    """The largest difference of any output, over the largest magnitude of that output."""
    tolerance: float
    """What was allowed."""
    sensitivity: float
    """How far outputs move when parameters are rounded differently."""
    dtype: str
    """What was computed in: "float64", or the narrowest dtype of the models."""

    def __str__(self) -> str:
        """Return the error, and what it was measured against."""
        return (
            f"error {self.error:.1e} in {self.dtype} (tolerance {self.tolerance:.1e}, "
            f"the models' own sensitivity {self.sensitivity:.1e})"
        )


def verify(
    plan: Plan,
    small_apply: Apply,
    small_params: Tree,
    big_apply: Apply,
    big_params: Tree,
    *inputs: Any,
    tolerance: float | None = None,
    double: bool | None = None,
) -> Verification:
    r"""Returns how far a grown model is from the small one, measured; raises if it is too far.

    .. math:: e = \max_{\text{outputs}} \frac{\lVert f'(W', x) - f(W, x)\rVert_\infty}
                                          {\lVert f(W, x)\rVert_\infty}

    Rounding differs between the two, and models amplify it.  So the tolerance is 16 times what
    outputs move when every parameter moves by one rounding, up or down at random (of the two
    models the larger), and a floor of 1e-12 where both are run in float64, else of 16 roundings.

    Args:
      plan: the plan that ``big_params`` were grown by.
      small_apply: the small model.
      small_params: its parameters.
      big_apply: the big model.
      big_params: its parameters.
      *inputs: inputs that both take.  For ``jax.ShapeDtypeStruct``, normal numbers (0 and 1 for
        integers) are drawn.
      tolerance: what e may be at most; None for the above, and for no limit where the plan is
        not exact (:func:`select`, copied layers): e is then what has changed.
      double: whether to compute in float64; None to do so on a CPU for models of up to 20 million
        parameters, if they can be run so.

    Returns:
      :class:`Verification`.

    Raises:
      ValueError: e is above the tolerance or not finite, with the outputs that are apart.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> small = {"up": normal(0, 5, 7), "down": normal(1, 7, 3)}
      >>> big = {"up": normal(0, 5, 14), "down": normal(1, 14, 3)}
      >>> x = normal(2, 2, 5)
      >>> plan = us.plan(apply, small, apply, big, x)
      >>> us.verify(plan, apply, small, apply, us.grow(small, plan), x).error < 1e-7
      True
      >>> us.verify(plan, apply, small, apply, big, x)
      Traceback (most recent call last):
      ...
      ValueError: the big model is not the same function as the small one.
        the output: relative difference ..., tolerance ...
      ...

    References:
      That a small difference of losses says nothing: DESIGN of this library; the tests compare
      whole training runs in float64.
    """
    given = _drawn(inputs)
    pair = (small_apply, small_params), (big_apply, big_params)
    if double is None:
        double = _cheap(small_params, big_params)
        try:
            found = _measured(*pair, given, double=double, epsilon=_epsilon(plan, small_params))
        except (TypeError, ValueError):  # a model that insists on the dtypes it was written for
            if not double:
                raise
            double = False
            found = _measured(*pair, given, double=False, epsilon=_epsilon(plan, small_params))
    else:
        found = _measured(*pair, given, double=double, epsilon=_epsilon(plan, small_params))
    small, big, moved = found
    if plan.kept:  # of a model that was shrunk, the big one is what it is measured by
        small, big = big, small
    floor = _DOUBLE_FLOOR if double else _FLOOR * float(jnp.finfo(plan.precision).eps)
    usual = floor + _AMPLIFIED * moved if plan.exact else math.inf
    allowed = usual if tolerance is None else tolerance
    return _judged(small, big, allowed, moved, "float64" if double else plan.precision)


def _judged(small: Tree, big: Tree, allowed: float, moved: float, dtype: str) -> Verification:
    names = output_names(small)
    pairs = list(zip(jax.tree.leaves(small), jax.tree.leaves(big), strict=True))
    errors = [_distance(a, b) for a, b in pairs]
    worst = max(errors, default=0.0)
    if worst <= allowed:
        return Verification(worst, allowed, moved, dtype)
    lines = [
        f"  {name}: relative difference {error:.2g}, tolerance {allowed:.2g}"
        for name, error in zip(names, errors, strict=True)
        if not error <= allowed
    ]
    advice = (
        f"Computed in {dtype}. Expected: equal outputs. Fix: grow the parameters with the plan "
        "that was made for these two models; if they were, please report it."
    )
    raise ValueError(
        "\n".join(["the big model is not the same function as the small one.", *lines, advice])
    )


def _distance(a: Any, b: Any) -> float:
    """The largest difference over the largest magnitude; infinite where only one is no number."""
    a, b = np.asarray(a), np.asarray(b)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return 0.0 if a.shape == b.shape and bool(np.all(a == b)) else math.inf
    wide = np.complex128 if np.iscomplexobj(a) else np.float64
    a, b = a.astype(wide), b.astype(wide)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    with np.errstate(invalid="ignore"):
        apart = np.where(same, 0.0, np.abs(a - b))
    size = np.max(np.abs(a[np.isfinite(a)]), initial=0.0)
    largest = float(np.max(apart, initial=0.0))
    return math.inf if math.isnan(largest) else largest / (float(size) or 1.0)


def _run(apply: Apply, params: Tree, inputs: Sequence[Any]) -> Any:
    return _jax.fetched(jax.jit(apply)(params, *inputs))


def _cheap(small: Tree, big: Tree) -> bool:
    """Whether float64 is to be had, and does not cost much."""
    size = sum(np.size(leaf) for leaf in jax.tree.leaves((small, big)))
    platforms = {d.platform for leaf in jax.tree.leaves((small, big)) for d in _devices(leaf)}
    return size <= _CHEAP and platforms <= {"cpu"} and jax.default_backend() == "cpu"


def _devices(leaf: Any) -> Sequence[jax.Device]:
    return list(leaf.devices()) if isinstance(leaf, jax.Array) else []


def _epsilon(plan: Plan, params: Tree) -> float:
    """The rounding of what is computed, or of parameters that are stored in less."""
    dtypes = [jnp.result_type(leaf) for leaf in jax.tree.leaves(params)]
    stored = [float(jnp.finfo(d).eps) for d in dtypes if jnp.issubdtype(d, jnp.inexact)]
    return max([float(jnp.finfo(plan.precision).eps), *stored])


def _measured(
    small: tuple[Apply, Tree],
    big: tuple[Apply, Tree],
    inputs: Sequence[Any],
    *,
    double: bool,
    epsilon: float,
) -> tuple[Any, Any, float]:
    """Both models' outputs, and how far they move by rounding."""
    with jax.enable_x64(True) if double else contextlib.nullcontext():
        trees = [small[1], big[1], tuple(inputs)]
        a, b, given = jax.tree.map(_widened, trees) if double else trees
        before, after = _run(small[0], a, given), _run(big[0], b, given)
        rounded = [
            (before, _run(small[0], _rounded(a, epsilon), given)),
            (after, _run(big[0], _rounded(b, epsilon), given)),
        ]
        pairs = [
            (x, y)
            for one, other in rounded
            for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
        ]
        moved = filter(math.isfinite, (_distance(x, y) for x, y in pairs))
        return before, after, max(moved, default=0.0)


def _widened(leaf: Any) -> Any:
    """A leaf in float64, or complex128; others as they are."""
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.inexact):
        return leaf
    wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
    return jnp.asarray(leaf).astype(wide)


def _rounded(params: Tree, epsilon: float) -> Tree:
    """Parameters that have moved by a rounding each, up or down at random."""
    leaves, treedef = jax.tree.flatten(params)
    moved = [
        _moved_program(_jax.named_sharding(leaf), epsilon)(jnp.asarray(leaf), jax.random.key(i))
        if _factors.is_scaled(jnp.asarray(leaf))
        else leaf
        for i, leaf in enumerate(leaves)
    ]
    return jax.tree.unflatten(treedef, moved)


@cache
def _moved_program(
    sharding: jax.sharding.NamedSharding | None, epsilon: float
) -> Callable[..., jax.Array]:
    """A compiled program: random numbers of a part are drawn where it is."""
    found: Callable[..., jax.Array] = compiled(partial(_moved, epsilon), sharding)
    return found


def _moved(epsilon: float, leaf: jax.Array, key: jax.Array) -> jax.Array:
    up = jax.random.bernoulli(key, 0.5, leaf.shape)
    return jnp.where(up, leaf * (1 + epsilon), leaf * (1 - epsilon)).astype(leaf.dtype)


def _drawn(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """Inputs with numbers where only shapes are given."""
    draw: Callable[[Any], Any] = lambda leaf: (  # noqa: E731
        _random(leaf) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf
    )
    return tuple(jax.tree.map(draw, tuple(inputs)))


def _random(shape: jax.ShapeDtypeStruct) -> jax.Array:
    key = jax.random.key(0)
    if jnp.issubdtype(shape.dtype, jax.dtypes.prng_key):
        return jax.random.split(key, shape.shape) if shape.shape else key
    if jnp.issubdtype(shape.dtype, jnp.inexact):
        return jax.random.normal(key, shape.shape, jnp.float32).astype(shape.dtype)
    return jax.random.bernoulli(key, 0.5, shape.shape).astype(shape.dtype)
