"""effective_lr_scale: what an optimizer really makes of a learning-rate factor, measured."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _factors, _probe, _tree
from uscale_jax._learning_rate import ACTIVE
from uscale_jax._types import Tree

_Norms: TypeAlias = np.ndarray[Any, np.dtype[np.float64]]

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
      IVb*, 2023 (arXiv:2308.01814).
    """
    if _factors.check_factor(factor, "factor") == 1 or steps < _EARLY:
        raise ValueError(
            f"effective_lr_scale needs factor ≠ 1 and steps ≥ {_EARLY}, got factor={factor} and "
            f"steps={steps}. Fix: factor=0.5, steps=50."
        )
    start = _filled(params, seed)
    gradients = grads or (lambda t: _probe.noise_like(start, seed + 1 + t, gradient_rms))
    doubled = _factors.multiply_tree(start, 2.0)
    norms = _run(
        _step(tx, extra_args),
        {
            "plain": _Run(tx.init(start), start),
            "bare": _Run(tx.init(start), start, active=0.0),
            "before": _Run(tx.init(start), start, before=factor),
            "after": _Run(tx.init(start), start, after=factor),
            "doubled": _Run(tx.init(doubled), doubled),
        },
        map(gradients, range(steps)),
    )
    plain, bare = norms["plain"], norms["bare"]
    keys, _, _ = _tree.flatten_named(start)
    return EffectiveScale(
        inside=_ratios(plain, bare),
        before=_ratios(norms["before"], plain),
        after=_ratios(norms["after"], plain),
        parameters=_ratios(norms["doubled"], plain),
        leaves={
            _tree.name(key): _ratio(a[-_EARLY:], b[-_EARLY:])
            for key, a, b in zip(keys, plain.T, bare.T, strict=True)
        },
        factor=float(factor),
    )


class _Run(NamedTuple):
    """One run of the optimizer, and what is changed in it."""

    state: optax.OptState
    params: Tree
    before: float = 1.0
    after: float = 1.0
    active: float = 1.0


def _run(step: Any, runs: dict[str, _Run], gradients: Iterable[Tree]) -> dict[str, _Norms]:
    """The update norms of each run, [steps, leaves]; all runs see the same gradients."""
    norms: dict[str, list[Any]] = {name: [] for name in runs}
    for grads in gradients:
        for name, run in runs.items():
            runs[name], norm = step(run, grads)
            norms[name].append(norm)
    return {name: np.asarray(jax.device_get(norm), np.float64) for name, norm in norms.items()}


def _filled(params: Tree, seed: int) -> Tree:
    """Parameters, with values of RMS 0.5 where only shapes are given."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda p: (
            _probe.noise_like(p, int(rng.integers(2**31)), 0.5)
            if isinstance(p, jax.ShapeDtypeStruct)
            else jnp.asarray(p)
        ),
        params,
    )


def _step(tx: optax.GradientTransformation, extra_args: Mapping[str, Any]) -> Any:
    whole = optax.with_extra_args_support(tx)

    @jax.jit
    def step(run: _Run, grads: Tree) -> tuple[_Run, list[jax.Array]]:
        grads = _factors.multiply_tree(grads, run.before)
        extra = {**extra_args, ACTIVE: run.active}
        updates, state = whole.update(grads, run.state, run.params, **extra)
        updates = _factors.multiply_tree(updates, run.after)
        norms = [_norm(update) for update in jax.tree.leaves(updates)]
        return run._replace(state=state, params=optax.apply_updates(run.params, updates)), norms

    return step


def _norm(update: jax.Array) -> jax.Array:
    if not _factors.is_scaled(update):
        return jnp.zeros(())
    return jnp.linalg.norm(jnp.ravel(update).astype(_factors.compute_dtype(update.dtype)))


def _ratios(changed: _Norms, plain: _Norms) -> Ratios:
    """The ratios over all leaves; norms come as [steps, leaves]."""
    whole = [np.linalg.norm(norms, axis=1) for norms in (changed, plain)]
    windows = (slice(0, 1), slice(0, _EARLY), slice(-_EARLY, None))
    return Ratios(*(_ratio(*(norms[window] for norms in whole)) for window in windows))


def _ratio(changed: _Norms, plain: _Norms) -> float:
    """The mean over steps; ones where the plain update is zero, as rprop's first, say nothing."""
    steps = np.flatnonzero(plain)
    return float(np.mean(changed[steps] / plain[steps])) if steps.size else math.nan
