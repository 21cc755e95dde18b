"""What an optimizer makes of copies, measured on stand-ins for the two models of a plan.

An elementwise optimizer answers equal gradients and parameters equally, so its update on copies is
the copies of its update.  One that mixes elements (a norm, a matrix square root) may answer with a
constant multiple of that, which can be divided out, or with something else, which cannot.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _factors, _jax
from uscale_jax._plan import Indices, LeafPlan
from uscale_jax._types import Key, Tree

COPIES = "uscale_jax_copies"
"""Extra argument by which the probe tells ``clip_by_global_norm`` n per leaf of its stand-ins."""

_Array: TypeAlias = np.ndarray[Any, Any]
_Build: TypeAlias = Callable[[Sequence[Any]], Tree]

_AS_THEY_ARE = 2**18  # elements up to which models are probed in their own sizes
_LARGEST_DIMS = 32, 48  # else dimensions are cut in proportion, to about this; and to be sure
_SMALL_DIM = 8  # but for those that are no width: kernels, heads, stacked layers
_SCALES = (0.01, 100.0)  # of gradients: a clip is active at one of them
_STEPS, _MOST_STEPS = 3, 16  # the latter for optimizers that accumulate gradients
_LOSS = np.float32(1.0)  # some are told it: Polyak's step, reduce_on_plateau
_TOLERANCE = 1e-3  # above the rounding of float32, below anything that mixes elements


class Response(NamedTuple):
    """How a leaf's update on copies compares with the copies of its update."""

    ratio: float = 1.0
    """The factor between them."""
    apart: float = 0.0
    """The largest relative difference between them, where no factor explains it; else 0."""
    affine: bool = False
    """Whether the factor is on the part that the update has at parameters 0 alone, as it is under
    decoupled weight decay."""


class Report(NamedTuple):
    """What was found."""

    responses: Mapping[Key, Response]
    """By key, of leaves that do not answer exactly."""
    coupled: bool = False
    """Whether the update of one leaf depends on the gradients of another."""
    uneven: bool = False
    """Whether copies are unequal in number where the difference cannot be divided out."""


class StandIn(NamedTuple):
    """A leaf in both models, in sizes that are cheap to compute with."""

    small: tuple[int, ...]
    big: tuple[int, ...]
    maps: tuple[Indices | None, ...]
    faithful: bool = True
    """Whether sizes are in the proportions of the leaf's own."""

    def copied(self, x: _Array) -> _Array:
        """Returns what the big model has for the small one's array; 0 in places without a unit."""
        for axis, old in enumerate(self.maps):
            if old is not None:
                there = (old >= 0).reshape([-1 if i == axis else 1 for i in range(x.ndim)])
                x = np.where(there, np.take(x, np.maximum(old, 0), axis), np.zeros((), x.dtype))
        return x

    @property
    def copies(self) -> _Array:
        """n, as an array that broadcasts against the big leaf."""
        n = np.ones([1] * len(self.big))
        for axis, old in enumerate(self.maps):
            if old is not None:
                counts = np.where(old >= 0, np.bincount(old[old >= 0])[np.maximum(old, 0)], 1)
                n = n * counts.reshape([-1 if i == axis else 1 for i in range(len(self.big))])
        return n

    @property
    def uneven(self) -> bool:
        """Whether units of the leaf are copied unequally often."""
        return bool(np.ptp(self.copies) > 0)


def stand_ins(leaves: Sequence[LeafPlan], largest: int) -> list[StandIn]:
    """Returns leaves in their own sizes where these are small, else cut to about the largest."""
    if sum(math.prod(leaf.big) for leaf in leaves) <= _AS_THEY_ARE:
        return [StandIn(leaf.small, leaf.big, leaf.maps_of(new_layers=False)) for leaf in leaves]
    return [_cut(leaf, largest) for leaf in leaves]


def _cut(leaf: LeafPlan, largest: int) -> StandIn:
    """Sizes divided by what divides them all: functions of their ratios stay what they are."""
    wide = [n for n in (*leaf.small, *leaf.big) if n > _SMALL_DIM]
    maps = leaf.maps_of(new_layers=False)
    if not wide:
        return StandIn(leaf.small, leaf.big, maps)
    exact = math.gcd(*wide) / 2  # to leave at least 2 of everything
    step = max(exact, max(wide) / largest)
    dims = [_cut_dim(*dim, step) for dim in zip(leaf.small, leaf.big, maps, strict=True)]
    small, big, maps = (tuple(part) for part in zip(*dims, strict=True))
    return StandIn(small, big, maps, faithful=step == exact)


def _cut_dim(
    small: int, big: int, old: Indices | None, step: float
) -> tuple[int, int, Indices | None]:
    if big <= _SMALL_DIM:
        return small, big, old
    units = max(2, round(small / step)) if small > 1 else 1
    if old is None:
        return units, units, None
    counts = np.bincount(old[old >= 0])
    if np.ptp(counts) == 0:
        each = np.full(units, counts[0])
    else:  # the first one has a copy more at least
        total = max(round(big / step), units + 1)
        each = np.full(units, total // units) + (np.arange(units) < max(total % units, 1))
    return units, int(each.sum()), np.repeat(np.arange(units), each)


class Trial(NamedTuple):
    """An optimizer and the stand-ins it is tried on."""

    tx: optax.GradientTransformationExtraArgs
    keys: Sequence[Key]
    leaves: Sequence[LeafPlan]
    build: _Build
    """Makes the tree that the optimizer is for of its leaves."""
    names: Callable[[Tree], Mapping[Key, Any]]
    """Takes one apart."""

    def report(self) -> Report | None:
        """Returns what differs from copies; None where the optimizer does not run on stand-ins."""
        try:
            with _jax.concretely(), jax.default_matmul_precision("highest"):
                return _report(self)
        except Exception:  # whatever an optimizer raises that wants more than gradients
            return None


_Steps: TypeAlias = dict[tuple[float, int], _Array]


class _Run(NamedTuple):
    """Updates by leaf, and by scale of the gradients and step."""

    wanted: dict[Key, _Steps]
    """The copies of the small model's."""
    got: dict[Key, _Steps]
    """The big model's."""


def _report(trial: Trial) -> Report:
    stands = stand_ins(trial.leaves, _LARGEST_DIMS[0])
    run = _Runner(trial, stands)
    plain = run(1.0, None)
    found = {key: r for key in plain.wanted if (r := _response(plain, key)) != Response()}
    coupled = bool(found) and _coupled(run, plain)
    if any(r.apart for r in found.values()) and not coupled:
        still = run(0.0, None)
        found = {key: _affine(plain, still, key) if r.apart else r for key, r in found.items()}
    if not coupled:
        found = _confirmed(trial, stands, found)
    else:  # a ratio would be that of these gradients
        found = {key: Response(apart=r.apart or abs(r.ratio - 1)) for key, r in found.items()}
    bad = {key for key, r in found.items() if r.apart}
    uneven = any(s.uneven for k, s in zip(trial.keys, stands, strict=True) if k in bad)
    return Report(found, coupled, uneven)


def _confirmed(
    trial: Trial, stands: Sequence[StandIn], found: Mapping[Key, Response]
) -> dict[Key, Response]:
    """Ratios of leaves whose stand-ins have other proportions must be the same in other sizes."""
    unsure = [
        key
        for key, stand in zip(trial.keys, stands, strict=True)
        if not stand.faithful and key in found and not found[key].apart
    ]
    if not unsure:
        return dict(found)
    run = _Runner(trial, stand_ins(trial.leaves, _LARGEST_DIMS[1]))
    other = run(0.0 if any(found[key].affine for key in unsure) else 1.0, None)
    changed = {
        key: Response(apart=abs(found[key].ratio - 1))
        for key in unsure
        if not math.isclose(_response(other, key).ratio, found[key].ratio, rel_tol=_TOLERANCE)
    }
    return {**found, **changed}


class _Runner:
    """Runs an optimizer on stand-ins of both models, on the same gradients and parameters."""

    def __init__(self, trial: Trial, stands: Sequence[StandIn]) -> None:
        self.trial, self.stands = trial, stands
        rng = np.random.default_rng(0)
        self.start = self._noise(rng, 0.5)
        # A part of all gradients is the same, and parameters move against it: some optimizers look
        # at how far they have come, and where to.
        self.common = self._noise(rng, 1.0)
        self.noise = [self._noise(rng, 1.0) for _ in range(_MOST_STEPS)]
        start, common = self._both(self.start), self._both(self.common)
        self.init = _jax.stage(self._init, *start)
        self.update = _jax.stage(self._update, self.init(*start), start, common)

    def __call__(self, parameters: float, loud: Key | None) -> _Run:
        """Returns the updates: parameters times a factor, one leaf's gradients times 10."""
        trial, found = self.trial, _Run({}, {})
        for scale in _SCALES:
            states = self.init(*self._both(self._weights(0, parameters)))
            sizes = [scale * (10 if key == loud else 1) for key in trial.keys]
            for t in range(_MOST_STEPS):
                weights = self._both(self._weights(t, parameters))
                grads = self._both(self._gradients(t, sizes))
                states, updates = self.update(states, weights, grads)
                self._record(found, (scale, t), *jax.device_get(updates))
                if t + 1 >= _STEPS and all(_answered(one, scale) for one in found.wanted.values()):
                    break
        return found

    def _noise(self, rng: np.random.Generator, rms: float) -> list[_Array]:
        pairs = zip(self.trial.leaves, self.stands, strict=True)
        return [_normal(leaf, stand, rng, rms) for leaf, stand in pairs]

    def _both(self, values: Sequence[_Array]) -> tuple[list[_Array], list[_Array]]:
        pairs = zip(self.stands, values, strict=True)
        return list(values), [stand.copied(x) for stand, x in pairs]

    def _weights(self, t: int, factor: float) -> list[_Array]:
        pairs = zip(self.start, self.common, strict=True)
        return [((w - 0.1 * t * c) * factor).astype(w.dtype) for w, c in pairs]

    def _gradients(self, t: int, sizes: Sequence[float]) -> list[_Array]:
        rows = zip(self.common, self.noise[t], sizes, self.trial.leaves, strict=True)
        return [((c + g) * (0 if leaf.new else size)).astype(c.dtype) for c, g, size, leaf in rows]

    def _init(self, *weights: Sequence[Any]) -> Any:
        return tuple(self.trial.tx.init(self.trial.build(side)) for side in weights)

    def _update(self, states: Any, weights: Any, grads: Any) -> Any:
        """One step of both; new states, and the updates by key."""
        copies = {k: stand.copies for k, stand in zip(self.trial.keys, self.stands, strict=True)}
        numbers = (dict.fromkeys(copies, 1.0), copies)
        found = []
        for given, state, params, n in zip(grads, states, weights, numbers, strict=True):
            trees = self.trial.build(given), state, self.trial.build(params)
            found.append(self.trial.tx.update(*trees, **{"value": _LOSS, COPIES: n}))
        return tuple(s for _, s in found), tuple(self.trial.names(u) for u, _ in found)

    def _record(
        self, found: _Run, step: tuple[float, int], small: Mapping[Key, Any], big: Mapping[Key, Any]
    ) -> None:
        for key, leaf, stand in zip(self.trial.keys, self.trial.leaves, self.stands, strict=True):
            if key in small and key in big and not leaf.new:
                wanted = stand.copied(np.asarray(small[key]))
                found.wanted.setdefault(key, {})[step] = wanted.ravel()
                found.got.setdefault(key, {})[step] = np.asarray(big[key]).ravel()


def _normal(leaf: LeafPlan, stand: StandIn, rng: np.random.Generator, rms: float) -> _Array:
    if not leaf.floating:
        return np.zeros(stand.small, np.int32)
    wide = _factors.compute_dtype(jnp.dtype(leaf.dtype))
    return (rms * rng.standard_normal(stand.small)).astype(wide)


def _answered(steps: _Steps, scale: float) -> bool:
    return any(x.any() for (at, _), x in steps.items() if at == scale)


def _pairs(run: _Run, key: Key) -> dict[tuple[float, int], tuple[_Array, _Array]]:
    """The wanted and the real updates of a leaf, of the steps in which there are any."""
    both = {step: (x, run.got[key][step]) for step, x in run.wanted[key].items()}
    return {step: pair for step, pair in both.items() if pair[0].any() or pair[1].any()}


def _response(run: _Run, key: Key) -> Response:
    pairs = list(_pairs(run, key).values())
    apart = max((_distance(u, e) for e, u in pairs), default=0.0)
    if apart < _TOLERANCE:
        return Response()
    ratio = _simple(float(np.mean([_ratio(u, e) for e, u in pairs])))
    if max(_distance(u, ratio * e) for e, u in pairs) < _TOLERANCE:
        return Response(ratio)
    return Response(apart=apart)


def _affine(plain: _Run, still: _Run, key: Key) -> Response:
    """The response to gradients alone, if what parameters add to it is as it should be."""
    alone, moving, resting = _response(still, key), _pairs(plain, key), _pairs(still, key)
    rest = max(
        (
            _distance(moving[step][1] - u, moving[step][0] - e, np.linalg.norm(e))
            for step, (e, u) in resting.items()
            if step in moving
        ),
        default=math.inf,
    )
    if alone.apart or rest > _TOLERANCE:
        return _response(plain, key)
    return alone._replace(affine=True)


def _distance(got: _Array, wanted: _Array, size: Any = None) -> float:
    """How far apart two updates are, relative to the wanted one."""
    size = np.linalg.norm(wanted) if size is None else size
    far = np.linalg.norm(got - wanted)
    return float(far / size) if size and np.isfinite(far) else math.inf


def _ratio(got: _Array, wanted: _Array) -> float:
    size = np.vdot(wanted, wanted).real
    return float(np.vdot(wanted, got).real / size) if size else math.inf


def _simple(ratio: float) -> float:
    """The square root of a simple fraction where it is one: measured in float32, used in any."""
    if not 0 < ratio < math.inf:
        return 1.0
    square = Fraction(ratio**2).limit_denominator(64)
    near = square > 0 and abs(ratio**2 / float(square) - 1) < 1e-4
    return math.sqrt(square) if near else ratio


def _coupled(run: _Runner, plain: _Run) -> bool:
    """Whether leaves answer to what happens in the first of them."""
    first, *others = plain.wanted
    loud = run(1.0, first)
    return any(
        _distance(loud.wanted[key][step], before) > _TOLERANCE
        for key in others
        for step, before in plain.wanted[key].items()
        if before.any() and step in loud.wanted[key]
    )
