"""effective_lr_scale: what an optimizer really makes of a learning-rate factor, measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from uscale_jax import _factors, _probe, _tree
from uscale_jax._learning_rate import ACTIVE
from uscale_jax._types import Tree

_EARLY = 5  # steps in the early window; the late window is the last as many steps
_TOLERANCE = 0.02  # on an order of homogeneity, p in U(c·g) = c^p·U(g)


class Ratios(NamedTuple):
    """Update norms of a changed run over those of the plain run, over three windows of steps."""

    first: float
    """Step 1."""
    early: float
    """Steps 1 to 5."""
    late: float
    """The last 5 steps."""


@dataclass(frozen=True)
class EffectiveScale:
    """What an optimizer makes of factors; every entry is a ratio of update norms, unit-free."""

    inside: Ratios
    """With the optimizer's own ``unit_scale_lr`` factors over without: 1/k where they act."""
    before: Ratios
    """With the gradients multiplied by ``factor`` over without: ``factor`` for linear optimizers,
    1 for scale-invariant ones."""
    after: Ratios
    """With the updates multiplied by ``factor``: ``factor`` unless the optimizer tracks the
    parameters it has produced."""
    parameters: Ratios
    """With the parameters doubled: 2 for optimizers whose steps are relative to the weights."""
    leaves: Mapping[str, float]
    """``inside`` per leaf, over the last 5 steps, by leaf name."""
    factor: float
    """The factor that ``before`` and ``after`` were measured with."""

    @property
    def scale(self) -> float:
        """What the ``unit_scale_lr`` factors inside multiply the learning rate by, in the end."""
        return self.inside.late

    @property
    def gradient_order(self) -> tuple[float, float]:
        """Order p in U(c·g) = c^p·U(g): over the early and the late window."""
        return _order(self.before.early, self.factor), _order(self.before.late, self.factor)

    @property
    def parameter_order(self) -> float:
        """Order q in U(c·W) = c^q·U(W), over the early window."""
        return _order(self.parameters.early, 2.0)

    @property
    def kind(self) -> str:
        """``'linear'`` (p = 1), ``'invariant'`` (p = 0: factors in front cancel) or neither."""
        for kind, order in (("linear", 1.0), ("invariant", 0.0)):
            if all(abs(p - order) < _TOLERANCE for p in self.gradient_order):
                return kind
        return "neither"

    def __str__(self) -> str:
        """A table of the measured ratios."""
        rows = [
            ("unit_scale_lr factors inside", self.inside),
            (f"gradients × {self.factor:g}", self.before),
            (f"updates × {self.factor:g}", self.after),
            ("parameters × 2", self.parameters),
        ]
        lines = [f"{'update norm changes by':<30}{'step 1':>10}{'steps 1-5':>11}{'late':>10}"]
        lines += [f"{name:<30}{r.first:>10.3f}{r.early:>11.3f}{r.late:>10.3f}" for name, r in rows]
        return "\n".join([*lines, f"in the gradients it is {self.kind}"])


def _order(ratio: float, factor: float) -> float:
    return math.log(ratio) / math.log(factor) if ratio > 0 else math.nan


def effective_lr_scale(
    tx: optax.GradientTransformation,
    params: Tree,
    *,
    grads: Callable[[int], Tree] | None = None,
    factor: float = 0.5,
    steps: int = 50,
    gradient_rms: float = 0.02,
    seed: int = 0,
    **extra_args: Any,
) -> EffectiveScale:
    r"""Returns what a whole optimizer makes of learning-rate factors, by running it.

    The optimizer is run for ``steps`` steps on the same gradients five times: as it is; without
    the :func:`unit_scale_lr` factors inside it; with gradients, or updates, times ``factor``; and
    with parameters doubled.  Each answer is a ratio of update norms

    .. math:: \rho = \operatorname{mean}_t\, \lVert u'_t \rVert / \lVert u_t \rVert

    over step 1, steps 1 to 5, and the last 5 steps.  Nothing is looked up: optimizers of optax,
    chains, wrappers and your own are measured alike.

    Args:
      tx: the whole optimizer.
      params: parameters; ``jax.ShapeDtypeStruct`` leaves are filled with normal values of RMS 0.5.
      grads: ``step -> gradients``; by default normal values of RMS ``gradient_rms``, new at each
        step.  Clipping depends on their size, so give real gradients where that matters.
      factor: the factor put before and after the optimizer.
      steps: number of steps, at least 5.
      gradient_rms: root mean square of the default gradients.
      seed: seed of the default gradients and of parameters given as shapes.
      **extra_args: passed to ``tx.update`` (``value=`` for ``optax.polyak_sgd``, for example).

    Returns:
      :class:`EffectiveScale`; print it for a table.

    Raises:
      TypeError, ValueError: ``factor`` is 1 or not a positive finite scalar; fewer than 5 steps.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> params = {"w": jnp.ones((3, 5))}
      >>> right = optax.chain(optax.adam(1e-3), us.unit_scale_lr(2.0))
      >>> round(us.effective_lr_scale(right, params).scale, 3)
      0.5
      >>> us.effective_lr_scale(optax.adam(1e-3), params).kind
      'invariant'

    References:
      Orders of homogeneity of optimizers and learning rates: Yang & Littwin, *Tensor Programs
      IVb*, 2023 (arXiv:2308.01814), section 2.
    """
    if _factors.check_factor(factor, "factor") == 1 or steps < _EARLY:
        raise ValueError(
            f"effective_lr_scale needs factor ≠ 1 and steps ≥ {_EARLY}, got factor={factor} and "
            f"steps={steps}. Fix: factor=0.5, steps=50."
        )
    start = _filled(params, seed)
    gradients = grads or (lambda t: _probe.random_like(start, seed + 1 + t, gradient_rms))
    step = _step(tx, extra_args)

    def run(weights: Tree = start, **changes: float) -> list[Tree]:
        knobs = {"before": 1.0, "after": 1.0, "active": 1.0} | changes
        arrays = {name: jnp.asarray(value, jnp.float32) for name, value in knobs.items()}
        carry, updates = (tx.init(weights), weights), []
        for t in range(steps):
            carry, update = step(carry, gradients(t), arrays)
            updates.append(update)
        return updates

    plain = run()
    bare = run(active=0.0)
    doubled = jax.tree.map(lambda w: _factors.multiply(w, 2.0), start)
    return EffectiveScale(
        inside=_ratios(plain, bare),
        before=_ratios(run(before=factor), plain),
        after=_ratios(run(after=factor), plain),
        parameters=_ratios(run(doubled), plain),
        leaves=_per_leaf(plain[-_EARLY:], bare[-_EARLY:]),
        factor=float(factor),
    )


def _filled(params: Tree, seed: int) -> Tree:
    """Floating parameters, with values where only shapes are given."""
    noise = _probe.random_like(params, seed, 0.5)
    return jax.tree.map(
        lambda p, n: n if isinstance(p, jax.ShapeDtypeStruct) else jnp.asarray(p), params, noise
    )


def _step(tx: optax.GradientTransformation, extra_args: Mapping[str, Any]) -> Any:
    whole = optax.with_extra_args_support(tx)

    @jax.jit
    def step(carry: Any, grads: Tree, knobs: Mapping[str, jax.Array]) -> Any:
        state, params = carry
        grads = _times(grads, knobs["before"])
        extra = {**extra_args, ACTIVE: knobs["active"]}
        updates, state = whole.update(grads, state, params, **extra)
        updates = _times(updates, knobs["after"])
        return (state, optax.apply_updates(params, updates)), updates

    return step


def _times(tree: Tree, factor: jax.Array) -> Tree:
    return jax.tree.map(lambda x: _factors.multiply(x, factor), tree)


def _ratios(changed: Sequence[Tree], plain: Sequence[Tree]) -> Ratios:
    windows = (slice(0, 1), slice(0, _EARLY), slice(-_EARLY, None))
    return Ratios(*(_ratio(changed[window], plain[window]) for window in windows))


def _ratio(changed: Sequence[Tree], plain: Sequence[Tree]) -> float:
    """The mean over steps; ones where the plain update is zero, as rprop's first, say nothing."""
    norms = [(_probe.norm(a), _probe.norm(b)) for a, b in zip(changed, plain, strict=True)]
    ratios = [a / b for a, b in norms if b]
    return sum(ratios) / len(ratios) if ratios else math.nan


def _per_leaf(changed: Sequence[Tree], plain: Sequence[Tree]) -> dict[str, float]:
    keys, _, _ = _tree.flatten_named(plain[0])
    columns = [zip(*map(jax.tree.leaves, run), strict=True) for run in (changed, plain)]
    return {_tree.name(key): _ratio(a, b) for key, a, b in zip(keys, *columns, strict=True)}
