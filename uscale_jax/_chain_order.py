"""Whether a factor in an optax chain reaches the end of it.

``optax.chain(us.unit_scale_lr(k), optax.adam(lr))`` is the line people write first, and Adam
cancels the factor.  A gradient transformation is told its input and nothing about what comes
after, and optax offers no other way to ask, so the stack of callers is read: the frames of
``optax.chain`` and ``optax.named_chain`` hold the update functions still to run, through any
nesting in masks, partitions, wrappers, ``nnx.Optimizer`` and jit traces.  What follows is then
measured on small stand-in values, with no table of optimizers.  Where it answers a halved input
with anything but half the update, the user is told.
"""

import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from types import FrameType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _factors, _jax, _probe, _tree
from uscale_jax._types import Tree

Update: TypeAlias = Callable[..., Any]

_STEPS = 16  # beyond RAdam's switch at step 5 and the usual gradient accumulation
_MAGNITUDES = (1.0, 100.0)  # against a state of order 1; a clip is active at one of them
_TOLERANCE = 0.05  # above the rounding of bfloat16 accumulators, below anything that normalises
_LIBRARIES = ("optax", "jax", "flax", "uscale_jax", "contextlib", "functools")


class UnitScaleOrderWarning(UserWarning):
    """``unit_scale_lr`` stands where its factor does not reach the learning rate."""


@dataclass(frozen=True)
class _Followers:
    """What an enclosing chain still runs after the transformation that is being updated."""

    updates: Tree
    params: Tree
    states: tuple[Any, ...]
    functions: tuple[Update, ...]
    extra_args: dict[str, Any]


@dataclass(frozen=True)
class _Response:
    """How a leaf answers half its input: the factor on its update, and how far from linear."""

    leaf: str
    ratio: float
    deviation: float


# What was measured, by the first function that follows and weak references to the others: an
# eager training loop asks at every step and is told once.  Only a cache of _respond.
_seen: "weakref.WeakKeyDictionary[Update, set[Any]]" = weakref.WeakKeyDictionary()


def check() -> None:
    """Warns, once, if what runs after the caller does not pass a factor on its updates on."""
    if not _can_read_chains():
        warnings.warn(_UNREADABLE, UnitScaleOrderWarning, stacklevel=_user_level())
        return
    for followers in _enclosing(sys._getframe(1)):
        if _is_new(followers.functions) and (message := _judge(followers)):
            warnings.warn(message, UnitScaleOrderWarning, stacklevel=_user_level())


_UNREADABLE = (
    "the installed optax builds chains in a way that cannot be read, so it is not known whether "
    "the factor of unit_scale_lr(k) reaches the learning rate. It does when it stands last: "
    "optax.chain(optax.adam(lr), us.unit_scale_lr(k)). us.effective_lr_scale(tx, params) tells."
)


@cache
def _can_read_chains() -> bool:
    """Tries two chains that are known, because what is read is no promise of optax."""
    found: list[_Followers | None] = []

    def update(updates: Tree, state: Any, params: Tree | None = None) -> tuple[Tree, Any]:
        found.append(next(_enclosing(sys._getframe(1)), None))
        return updates, state

    first, last = optax.GradientTransformation(lambda params: (), update), optax.identity()
    for chain in (optax.chain(first, last), optax.named_chain(("a", first), ("b", last))):
        chain.update({}, chain.init({}), {})
    return all(one is not None and len(one.functions) == 1 for one in found)


def _is_new(functions: tuple[Update, ...]) -> bool:
    known = _seen.setdefault(functions[0], set())
    others = tuple(weakref.ref(function) for function in functions[1:])
    new = others not in known
    known.add(others)
    return new


def _enclosing(frame: FrameType | None) -> Iterator[_Followers]:
    """What follows in every chain that is being updated, the innermost first.

    Ends at our own trial runs: the chains around those are no concern of what runs in them.
    """
    while frame is not None and frame.f_code not in _TRIALS:
        if frame.f_globals.get("__name__", "").startswith("optax."):
            reader = _READERS.get(frame.f_code.co_qualname)
            if reader and (found := _read(reader, frame.f_locals)):
                yield found
        frame = frame.f_back


def _read(reader: "_Reader", local: dict[str, Any]) -> _Followers | None:
    try:
        return reader(local)
    except (AttributeError, KeyError, TypeError):  # another optax: _can_read_chains says so
        return None


def _read_chain(local: dict[str, Any]) -> _Followers | None:
    done = len(local["new_state"]) + 1
    return _followers(local, local["update_fns"][done:], tuple(local["state"])[done:])


def _read_named_chain(local: dict[str, Any]) -> _Followers | None:
    rest = local["transforms"][len(local["new_state"]) + 1 :]
    return _followers(
        local,
        tuple(transformation.update for _, transformation in rest),
        tuple(local["state"][name] for name, _ in rest),
    )


def _followers(
    local: dict[str, Any], functions: tuple[Update, ...], states: tuple[Any, ...]
) -> _Followers | None:
    if not functions:
        return None
    return _Followers(local["updates"], local["params"], states, functions, local["extra_args"])


# The functions of optax whose frames are read, by qualified name (optax 0.2.6 to 0.2.8).
_Reader: TypeAlias = Callable[[dict[str, Any]], _Followers | None]
_READERS: dict[str, _Reader] = {
    "chain.<locals>.update_fn": _read_chain,
    "named_chain.<locals>.update_fn": _read_named_chain,
}


def _judge(followers: _Followers) -> str | None:
    """The warning for what follows, or None if it passes factors on."""
    try:
        response = _respond(followers)
    except Exception as error:  # whatever a third-party update function raises on stand-ins
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:120]
        return _message(followers, f"could not be tried on stand-in values ({reason})")
    if response.deviation < _TOLERANCE:
        return None
    return _message(
        followers,
        f"does not pass the factor on: a gradient × 0.5 gave an update × {response.ratio:.2f} "
        f"in leaf {response.leaf!r}, so the learning rate is not α/k",
    )


def _message(followers: _Followers, finding: str) -> str:
    return (
        f"unit_scale_lr(k) stands in front of {_describe(followers)}, which {finding}. "
        "Put unit_scale_lr last: optax.chain(optax.adam(lr), us.unit_scale_lr(k)) trains at α/k "
        "whatever the optimizer. us.effective_lr_scale(tx, params) measures a whole optimizer."
    )


def _describe(followers: _Followers) -> str:
    """The states' types say best what follows: people know ScaleByAdam from optax's own names."""
    types = [type(node).__name__ for node in _named_tuples(followers.states)]
    kinds = [name.removesuffix("State") for name in types if name not in _PLUMBING]
    return ", ".join(dict.fromkeys(kinds)) or "a transformation"


_PLUMBING = ("EmptyState", "MaskedNode", "MaskedState", "PartitionState")


def _named_tuples(node: Any) -> Iterator[Any]:
    if hasattr(node, "_fields"):
        yield node
    children = node.values() if isinstance(node, dict) else node
    if isinstance(children, tuple | list) or isinstance(node, dict):
        for child in children:
            yield from _named_tuples(child)


def _respond(followers: _Followers) -> _Response:
    shapes = _probe.small_shapes((followers.updates, followers.states, followers.params))
    extra = {name: _stand_in(value) for name, value in followers.extra_args.items()}

    def step(updates: Tree, states: Any, params: Tree) -> Any:
        new_states = []
        for function, state in zip(followers.functions, states, strict=True):
            updates, new_state = function(updates, state, params, **extra)
            new_states.append(new_state)
        return updates, tuple(new_states)

    return _measure(step, *shapes)


def _stand_in(value: Any) -> Any:
    return np.ones((), np.float32) if isinstance(value, jax.Array) and not value.shape else value


def _measure(step: Callable[..., Any], updates: Tree, states: Any, params: Tree) -> _Response:
    """Runs ``step`` on inputs of magnitude 0, a/2 and a; the response must be affine in them."""
    staged = _jax.stage(step, updates, states, params)
    with _jax.concretely():
        return _affinity(staged, updates, states, params)


_TRIALS = {_measure.__code__, _can_read_chains.__wrapped__.__code__}


def _affinity(staged: Callable[..., Any], updates: Tree, states: Any, params: Tree) -> _Response:
    start, weights = _probe.generic_values(states, 1), _probe.generic_values(params, 2)
    inputs = [_probe.noise_like(updates, seed, 1.0) for seed in range(_STEPS)]

    @jax.jit
    def advance(one: Tree, states: Any, weights: Tree, magnitude: jax.Array) -> Any:
        return staged(_factors.multiply_tree(one, magnitude), states, weights)

    def outputs(magnitude: float) -> list[Tree]:
        state, found, size = start, [], jnp.float32(magnitude)
        for one in inputs:
            output, state = advance(one, state, weights, size)
            found.append(output)
        return found

    keys, _, _ = _tree.flatten_named(updates)
    none = _columns(outputs(0.0))
    answers = [
        answer
        for magnitude in _MAGNITUDES
        for answer in map(
            _compare,
            map(_tree.name, keys),
            none,
            _columns(outputs(magnitude / 2)),
            _columns(outputs(magnitude)),
        )
        if answer
    ]
    if not answers:
        raise ValueError(f"no update in {_STEPS} steps")
    return max(answers, key=lambda answer: answer.deviation)


def _columns(outputs: list[Tree]) -> list[np.ndarray]:
    """Each leaf over all steps, [steps, size], in float64."""
    flat = [jax.device_get(jax.tree.leaves(output)) for output in outputs]
    return [
        np.stack([np.ravel(leaf).astype(np.float64) for leaf in column])
        for column in zip(*flat, strict=True)
    ]


def _compare(name: str, none: Any, half: Any, full: Any) -> _Response | None:
    """A leaf's worst step; None if it never answers its input (frozen, accumulating)."""
    if not all(np.all(np.isfinite(x)) for x in (none, half, full)):
        raise ValueError("the updates are not finite")
    norm: Callable[[Any], Any] = partial(np.linalg.norm, axis=1)
    sizes = norm(full - none)
    steps = np.flatnonzero(sizes)
    if steps.size == 0:
        return None
    ratios = norm(half - none)[steps] / sizes[steps]
    deviations = norm(half - none - (full - none) / 2)[steps] / sizes[steps]
    # The last step says best what the optimizer settles to, unless the factor acts by then.
    said = -1 if deviations[-1] > _TOLERANCE else int(np.argmax(deviations))
    return _Response(name, float(ratios[said]), float(np.max(deviations)))


def _user_level() -> int:
    """The stacklevel, seen from check, of the first frame outside the libraries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").split(".")[0] not in _LIBRARIES:
            return level
        frame, level = frame.f_back, level + 1
    return level
