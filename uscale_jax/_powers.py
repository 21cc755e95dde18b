"""Powers of m and n: with which of them the arrays in the state of an optimizer scale."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _factors, _jax, _tree
from uscale_jax._places import fitting, is_absent
from uscale_jax._plan import LeafPlan, Plan
from uscale_jax._types import Key, Tree

Terms: TypeAlias = tuple[Any, ...]
"""Floats and arrays that broadcast against a leaf; their product is a factor."""

_AS_IT_IS = 2**22  # elements up to which a model is tried in its own sizes
_LARGEST_DIM = 128  # else dimensions are cut to this: where Adafactor starts to factor
_SCALES = (0.01, 10.0)  # root mean squares of gradients: what differs between them is no power
_STEPS, _MOST_STEPS = 3, 17  # the latter for optimizers that accumulate gradients
_TOLERANCE = 0.02


def terms(leaf: LeafPlan, *, m: float = 0, n: float = 0) -> Terms:
    """Returns m and n of a leaf to these powers: one float, and arrays where elements differ."""
    return _product((leaf.factors, m), (leaf.copies, n))


def rate_terms(leaf: LeafPlan) -> Terms:
    """Returns what the learning rate of a leaf takes in the same form: m, but of chosen units."""
    return _product((leaf.factors if leaf.rates is None else leaf.rates, 1))


def _product(*powers: tuple[Sequence[Any], float]) -> Terms:
    found: dict[tuple[int, ...], Any] = {}
    for arrays, exponent in powers:
        for array in arrays if exponent else ():
            shape = np.shape(array)
            found[shape] = found.get(shape, 1.0) * np.asarray(array, np.float64) ** exponent
    constants = [array.flat[0] for array in found.values() if np.ptp(array) == 0]
    constant = float(np.prod(constants))
    arrays = tuple(array for array in found.values() if np.ptp(array) > 0)
    return arrays if constant == 1 else (constant, *arrays)


def times(x: jax.Array, factors: Terms, shift: float = 0.0) -> jax.Array:
    """Returns (c + x)·factors − c in the dtype of x, rounded once."""
    if not factors:
        return x
    wide = _factors.compute_dtype(x.dtype)
    y = x.astype(wide) + jnp.asarray(shift, wide)
    for factor in factors:
        y = y * jnp.asarray(factor).astype(wide)
    return _jax.with_weak_type((y - jnp.asarray(shift, wide)).astype(x.dtype), x)


@dataclass(frozen=True)
class Scale:
    """What takes a leaf of the big model into the small one's frame and back."""

    into: Terms
    """1/m."""
    gradients: Terms
    """m·n."""
    out: Terms
    """m."""
    shift: float

    @staticmethod
    def of(leaf: LeafPlan) -> Scale:
        """Returns that of a leaf."""
        return Scale(terms(leaf, m=-1), terms(leaf, m=1, n=1), rate_terms(leaf), leaf.shift)

    def divided(self, ratio: float) -> Scale:
        """Returns one whose steps are divided by a constant."""
        floats = [term for term in self.out if isinstance(term, float)]
        arrays = [term for term in self.out if not isinstance(term, float)]
        return replace(self, out=(math.prod(floats) / ratio, *arrays)) if ratio != 1 else self

    def weight(self, x: jax.Array) -> jax.Array:
        """Returns (c + W')/m − c."""
        return times(x, self.into, self.shift)

    def gradient(self, x: jax.Array) -> jax.Array:
        """Returns m·n·g'."""
        return times(x, self.gradients)

    def step(self, x: jax.Array) -> jax.Array:
        """Returns m·u."""
        return times(x, self.out)


def mapped(
    tree: Tree, plan: Plan, scales: Mapping[Key, Scale], how: Callable[[Scale, Any], Any]
) -> Tree:
    """Returns the tree with every floating array through one of the maps of its scale."""
    keys, leaves, treedef = _tree.flatten_named(tree, is_leaf=is_absent)
    owners = fitting(plan, keys, leaves)
    through = [
        how(scales[owner.key], jnp.asarray(x)) if owner is not None and is_scaled(x) else x
        for x, owner in zip(leaves, owners, strict=True)
    ]
    return jax.tree.unflatten(treedef, through)


def is_scaled(x: Any) -> bool:
    """Returns whether it is a floating array: optax initialises with placeholders too."""
    return isinstance(x, jax.Array | np.ndarray | np.generic) and _factors.is_scaled(x)


class Power(NamedTuple):
    """An array is multiplied by a^p·b^q as gradients are by a and parameters by b."""

    p: float
    q: float


def measure(tx: optax.GradientTransformation, plan: Plan, part: Key) -> Mapping[Key, Power | None]:
    """Returns powers of floating arrays by key in the state of the small model's optimizer.

    None where no power fits.  Arrays that stay zero are left out.

    Raises:
      ValueError: the optimizer does not run on gradients and parameters alone.
    """
    try:
        with _jax.concretely():
            return _measured(optax.with_extra_args_support(tx), plan, part)
    except Exception as error:  # whatever an optimizer raises that wants more
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        raise ValueError(
            f"resize_state(..., optimizer=tx) could not try the optimizer ({reason}). Fix: keep "
            "its state in the small model's frame, resize_state(state, plan), and train with "
            "us.scale_optimizer(tx, plan)."
        ) from error


_Arrays: TypeAlias = list[dict[Key, Any]]


def _measured(
    tx: optax.GradientTransformationExtraArgs, plan: Plan, part: Key
) -> Mapping[Key, Power | None]:
    sources = {
        leaf.source: leaf for leaf in plan.leaves.values() if leaf.source[: len(part)] == part
    }
    # Leaves by other factors than their neighbours: what mixes leaves has no power.
    bases = {key: 2.0 + 2.0 * (i % 2) for i, key in enumerate(sources)}
    run = _runner(tx, plan, part, sources, bases)
    found: dict[Key, set[Power | None]] = {}
    for scale in _SCALES:
        plain = run(scale, False, False, 0)
        louder, larger = run(scale, True, False, len(plain)), run(scale, False, True, len(plain))
        for key in plain[0]:
            columns = [[step[key] for step in one] for one in (plain, louder, larger)]
            if any(x.any() for x in columns[0]):
                base = _base(key, bases, part)
                p, q = (_exponent(columns[0], changed, base) for changed in columns[1:])
                power = None if p is None or q is None else Power(p, q)
                found.setdefault(key, set()).add(power)
    return {key: one.pop() if len(one) == 1 else None for key, one in found.items()}


def _base(key: Key, bases: Mapping[Key, float], part: Key) -> float:
    """The factor of the leaf that an array in the state is named after."""
    ends = ((*part, *key[start:]) for start in range(len(key) + 1))
    return next((bases[end] for end in ends if end in bases), 2.0)


def _runner(
    tx: optax.GradientTransformationExtraArgs,
    plan: Plan,
    part: Key,
    sources: Mapping[Key, LeafPlan],
    bases: Mapping[Key, float],
) -> Callable[[float, bool, bool, int], _Arrays]:
    """A function that runs the optimizer on gradients and parameters, times the bases or not."""
    shapes = _sizes(list(sources.values()))
    rng = np.random.default_rng(0)

    def tree(rms: float) -> Mapping[Key, Any]:
        return {key: _normal(leaf, shapes[key], rng, rms) for key, leaf in sources.items()}

    def built(values: Mapping[Key, Any], scale: float, changed: bool) -> Tree:
        sizes = {key: scale * (bases[key] if changed else 1) for key in values}
        scaled = {key: (x * sizes[key]).astype(x.dtype) for key, x in values.items()}
        whole = plan.unflatten_small({**dict.fromkeys(plan.small_keys), **scaled})
        return whole[part[0]] if part else whole

    start, noise = tree(0.5), [tree(1.0) for _ in range(_MOST_STEPS)]
    weights = {changed: built(start, 1.0, changed) for changed in (False, True)}
    begin = _jax.stage(tx.init, weights[False])

    def step(state: Any, params: Tree, grads: Tree) -> Any:
        return tx.update(grads, state, params)[1]

    advance = _jax.stage(step, begin(weights[False]), weights[False], built(noise[0], 1.0, False))

    def run(scale: float, louder: bool, larger: bool, steps: int) -> _Arrays:
        state, found = begin(weights[larger]), []
        for t, one in enumerate(noise):
            state = advance(state, weights[larger], built(one, scale, louder))
            found.append(_floating(state))
            if t + 1 == steps or (not steps and t + 1 >= _STEPS and _all_filled(found[-1])):
                break
        return found

    return run


def _sizes(leaves: Sequence[LeafPlan]) -> dict[Key, tuple[int, ...]]:
    fits = sum(math.prod(leaf.small) for leaf in leaves) <= _AS_IT_IS
    most = max((n for leaf in leaves for n in leaf.small), default=1) if fits else _LARGEST_DIM
    return {leaf.source: tuple(min(n, most) for n in leaf.small) for leaf in leaves}


def _normal(leaf: LeafPlan, shape: tuple[int, ...], rng: Any, rms: float) -> Any:
    if not leaf.floating:
        return np.zeros(shape, np.int32)
    wide = _factors.compute_dtype(jnp.dtype(leaf.dtype))
    return (rms * rng.standard_normal(shape)).astype(wide)


def _floating(state: Any) -> dict[Key, Any]:
    keys, leaves, _ = _tree.flatten_named(state)
    pairs = zip(keys, leaves, strict=True)
    kept = {k: x for k, x in pairs if hasattr(x, "dtype") and _factors.is_scaled(x)}
    return {k: np.asarray(x, np.float64) for k, x in jax.device_get(kept).items()}


def _all_filled(arrays: Mapping[Key, Any]) -> bool:
    return all(x.any() for x in arrays.values() if x.shape != (1,))


def _exponent(plain: Sequence[Any], changed: Sequence[Any], base: float) -> float | None:
    """The power of the base, a multiple of 1/2, that takes one to the other in all steps."""
    sizes = [np.linalg.norm(np.concatenate([x.ravel() for x in side])) for side in (plain, changed)]
    if not sizes[1]:
        return None
    power = round(2 * math.log(sizes[1] / sizes[0], base)) / 2
    apart = [np.linalg.norm(y - base**power * x) for x, y in zip(plain, changed, strict=True)]
    most = [_TOLERANCE * np.linalg.norm(base**power * x) for x in plain]
    return power if all(a <= m for a, m in zip(apart, most, strict=True)) else None
