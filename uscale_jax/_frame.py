"""scale_optimizer: any optimizer, run in the frame of the small model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache, partial
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax

from uscale_jax import _chain_order, _factors, _tree
from uscale_jax._inverse import inverse, is_of_small
from uscale_jax._optimizer_probe import Report, Response, Trial
from uscale_jax._places import fitting, is_absent, kept_otherwise
from uscale_jax._plan import Plan
from uscale_jax._powers import Scale, mapped
from uscale_jax._transfer_result import Transfer
from uscale_jax._types import Key, Tree
from uscale_jax._unit_result import UnitScaled

_Of: TypeAlias = "Callable[[Tree], _Frame]"


class UnitScaleFrameWarning(UserWarning):
    """An optimizer does not treat copies as it treats what they are copies of."""


def scale_optimizer(
    tx: optax.GradientTransformation, plan: Plan | Transfer | UnitScaled, *, check: bool = True
) -> optax.GradientTransformationExtraArgs:
    r"""Returns an optimizer under which the big model of a plan trains as the small one would.

    With grown parameters :math:`W' = m\,(c + W)[\mathrm{maps}] - c`, n copies of every element,
    gradients are :math:`g' = g[\mathrm{maps}] / (m n)`.  The optimizer runs in the small model's
    frame, and what it returns is taken out of it:

    .. math::
      F(W') = \frac{c + W'}{m} - c,\qquad
      \mathrm{init}(W') = \mathrm{opt.init}(F(W')),\qquad
      \mathrm{update}(g', s, W') = m \cdot \mathrm{opt.update}(m\,n\,g',\, s,\, F(W'))

    so that grown parameters with a state from :func:`resize_state` follow the small model's
    training step by step: loss for loss, with the small model's learning rate, ε, weight decay and
    schedules.  Where there are units that are no copies (``grow(..., symmetry=...)``, new lanes
    under LayerNorm, new layers) training is another from the first step on, and the frame is what
    transfers the hyper-parameters: what ``Plan.lr_factors`` and the table in :func:`plan` do by
    hand.

    ==========================================  ===================================================
    elementwise: SGD, momentum, Adam(W), Lion,  exact
    RMSProp, ...; with schedules, masks,
    partitions, accumulation, weight decay
    norms or means per leaf: LAMB, LARS,        exact where units are copied equally often
    Adafactor
    matrices: Muon                              the same; its update, which is too small by a
                                                constant per leaf, is divided by that
    norms over all leaves                       not exact; for clipping there is
                                                :func:`clip_by_global_norm`
    ==========================================  ===================================================

    **Shrinking.**  For the small model's parameters, of a plan with chosen units (:func:`select`)
    or any other, ``tx`` is the big model's optimizer, and everything is the other way round: the
    learning rate of Adam is α·k for what sums over an axis that became k times smaller, decoupled
    decay λ/k.  Shapes say which of the two it is.  Nothing is tried there, and what takes norms or
    means over elements (LAMB, clipping) takes them over those of the small model.

    **Transfer.**  With what :func:`transfer` returned in place of a plan, a fresh target model is
    trained with the learning rates, ε and decay of the rule: Adam sees gradients over the factor of
    ε, parameters times that of decay, and its update takes that of the learning rate.

    **Units.**  With what :func:`unit_scale` returned, the unit-scaled model is trained as the model
    itself would be: the optimizer sees the model's own parameters and gradients, and its update is
    divided by s.  That is exact for every optimizer.

    Nothing is looked up: at first use the optimizer is tried on small stand-ins for the two models
    of the plan, and where its update on copies is not the copies of its update, constants are
    divided out, and the rest is said in a :class:`UnitScaleFrameWarning`.

    Args:
      tx: the optimizer of the small model (to shrink: of the big one), unchanged: anything of
        optax, chains, your own.
      plan: what :func:`plan` returned, or ``Plan.from_json``; or what :func:`transfer` or
        :func:`unit_scale` returned.
      check: try the optimizer on stand-ins.  Without it nothing is divided out either.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` for the big model's parameters, or for a part of
      them such as ``variables["params"]``.  Trees fit by name: dicts, ``FrozenDict``,
      ``nnx.State``, with ``None`` and ``optax.MaskedNode`` in place of leaves.  Its state is the
      state of ``tx`` and nothing more, in the small model's frame: what reads parameters out of
      it (``optax.contrib.schedule_free_eval_params``) gets them in this frame.  Updates keep dtype
      and weak type; those narrower than float32 are multiplied in float32 and rounded once.  What
      looks at the loss along a direction, such as a line search, stands behind it:
      ``optax.chain(us.scale_optimizer(tx, plan), optax.scale_by_backtracking_linesearch(15))``.

    Raises:
      ValueError: at first use, where the tree is not that of the plan's big model; where ``tx``
        needs functions of the parameters (``value_fn``), which are not passed on.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(x @ params["up"]) @ params["down"]
      >>> def loss(params, x):
      ...     return jnp.mean(jnp.square(apply(params, x) - 1))
      >>> normal = lambda seed, *shape: jax.random.normal(jax.random.key(seed), shape)
      >>> small = {"up": normal(0, 5, 7), "down": normal(1, 7, 3)}
      >>> big = {"up": normal(0, 5, 14), "down": normal(1, 14, 3)}
      >>> x = normal(2, 2, 5)
      >>> plan = us.plan(apply, small, apply, big, x)
      >>> def train(tx, params, state):
      ...     def step(carry, _):
      ...         params, state = carry
      ...         updates, state = tx.update(jax.grad(loss)(params, x), state, params)
      ...         return (optax.apply_updates(params, updates), state), None
      ...     return jax.lax.scan(step, (params, state), length=5)[0]
      >>> tx = optax.adamw(0.1)
      >>> small, state = train(tx, small, tx.init(small))
      >>> grown, grown_state = us.grow(small, plan), us.resize_state(state, plan)
      >>> small, _ = train(tx, small, state)
      >>> grown, _ = train(us.scale_optimizer(tx, plan), grown, grown_state)
      >>> bool(jnp.allclose(loss(grown, x), loss(small, x), rtol=1e-5))
      True

    References:
      Ma et al., *μP upscaling*, 2026 (arXiv:2602.10545); the learning rates it comes to are those
      of Yang et al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Table 3.
    """
    inner = optax.with_extra_args_support(tx)
    frame = _frame_of(inner, plan, check)

    def init(params: Tree) -> optax.OptState:
        plan, scales, corrections = frame(params)
        corrections.of(params)
        return inner.init(mapped(params, plan, scales, Scale.weight))

    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        plan, scales, corrections = frame(updates if params is None else params)
        responses = corrections.of(updates if params is None else params)
        inside = mapped(updates, plan, scales, Scale.gradient)
        weights = None if params is None else mapped(params, plan, scales, Scale.weight)
        step = partial(_without_functions, inner.update, extra_args)
        steps, new = step(inside, state, weights)
        if any(response.affine for response in responses.values()):
            still = jax.tree.map(jnp.zeros_like, weights)
            alone, _ = step(inside, state, still)
            steps = _without_ratio(steps, alone, plan, responses)
        ratios = {key: r.ratio for key, r in responses.items() if not r.affine}
        out = {key: scale.divided(ratios.get(key, 1.0)) for key, scale in scales.items()}
        return mapped(steps, plan, out, Scale.step), new

    return optax.GradientTransformationExtraArgs(init, update)


def _frame_of(
    inner: optax.GradientTransformationExtraArgs, plan: Plan | Transfer | UnitScaled, check: bool
) -> _Of:
    if isinstance(plan, Transfer):
        return _alone(inner, plan.plan, plan.scales())
    if isinstance(plan, UnitScaled):
        return _alone(inner, plan.plan, plan.frame())
    return _either(inner, plan, check)


def _alone(
    inner: optax.GradientTransformationExtraArgs, plan: Plan, scales: Mapping[Key, Scale]
) -> _Of:
    """Of a model that holds no copies: there is nothing to try the optimizer on."""
    one = _Frame(plan, _Corrections(inner, plan, check=False), scales)
    return lambda tree: one


def _either(inner: optax.GradientTransformationExtraArgs, plan: Plan, check: bool) -> _Of:
    """The direction that a tree's shapes are of."""
    grown = _Frame(plan, _Corrections(inner, plan, check))

    @cache
    def shrunk() -> _Frame:
        # Units that are gone are no copies either.
        back = inverse(plan)
        return _Frame(back, _Corrections(inner, back, check=False))

    def frame(tree: Tree) -> _Frame:
        keys, leaves, _ = _tree.flatten_named(tree, is_leaf=is_absent)
        return shrunk() if is_of_small(plan, keys, leaves) else grown

    return frame


class _Frame:
    """One direction: the plan to the model that is trained, and what its leaves take."""

    def __init__(
        self,
        plan: Plan,
        corrections: _Corrections,
        scales: Mapping[Key, Scale] | None = None,
    ) -> None:
        self.plan, self.corrections = plan, corrections
        own = {leaf.key: Scale.of(leaf) for leaf in plan.leaves.values()}
        self.scales = own if scales is None else scales

    def __iter__(self) -> Iterator[Any]:
        return iter((self.plan, self.scales, self.corrections))


def _without_functions(update: Any, extra_args: Mapping[str, Any], *trees: Any) -> Any:
    """An update without what is a function of the big model's parameters: these are in a frame."""
    functions = {name for name, value in extra_args.items() if callable(value)}
    try:
        return update(*trees, **{k: v for k, v in extra_args.items() if k not in functions})
    except TypeError as error:
        if not any(name in str(error) for name in functions):
            raise
        raise ValueError(
            f"inside scale_optimizer is what needs functions of the parameters ({error}). These "
            "are functions of the big model's, and inside they are in the small model's frame. "
            "Fix: put it behind, optax.chain(us.scale_optimizer(tx, plan), "
            "optax.scale_by_backtracking_linesearch(15))."
        ) from error


class _Corrections:
    """What is measured of an optimizer, once a tree: at its first use, in the middle of a trace."""

    def __init__(self, tx: optax.GradientTransformationExtraArgs, plan: Plan, check: bool) -> None:
        self._tx, self._plan, self._check = tx, plan, check
        self._known: dict[tuple[Key, ...], Mapping[Key, Response]] = {}

    def of(self, tree: Tree) -> Mapping[Key, Response]:
        """Returns how leaves answer that do not answer exactly, by key in the plan."""
        keys, leaves, treedef = _tree.flatten_named(tree, is_leaf=is_absent)
        present = [not is_absent(leaf) for leaf in leaves]
        if not self._check or not all(
            hasattr(leaf, "shape") for leaf in leaves if not is_absent(leaf)
        ):
            return {}  # optax initialises with placeholders to find its way around
        seen = tuple(key for key, there in zip(keys, present, strict=True) if there)
        if seen not in self._known:
            self._known[seen] = {}
            self._known[seen] = self._measured(keys, leaves, treedef)
        return self._known[seen]

    def _measured(
        self, keys: Sequence[Key], nodes: Sequence[Any], treedef: Any
    ) -> Mapping[Key, Response]:
        owners = fitting(self._plan, keys, nodes)

        def build(values: Sequence[Any]) -> Tree:
            given = iter(values)
            return jax.tree.unflatten(treedef, [x if is_absent(x) else next(given) for x in nodes])

        def names(tree: Tree) -> Mapping[Key, Any]:
            own, values, _ = _tree.flatten_named(tree)
            return dict(zip(own, values, strict=True))

        owned = {key: owner for key, owner in zip(keys, owners, strict=True) if owner is not None}
        trial = Trial(self._tx, list(owned), list(owned.values()), build, names)
        report = trial.report()
        bad = {} if report is None else {k: r for k, r in report.responses.items() if r.apart}
        kept = self._kept_otherwise(trial)
        if report is not None and (bad or kept):
            text = _message(report, kept)
            warnings.warn(text, UnitScaleFrameWarning, stacklevel=_chain_order._user_level())
        responses = {} if report is None else report.responses
        return {owned[k].key: r for k, r in responses.items() if not r.apart}

    def _kept_otherwise(self, trial: Trial) -> list[str]:
        """Names of what the optimizer keeps for the big model and cannot be had by copying.

        Stand-ins may be too small to tell: Adafactor keeps rows and columns from a size on.
        """

        def state(shapes: Sequence[tuple[int, ...]]) -> Any:
            zeros = lambda: trial.build([jnp.zeros(shape) for shape in shapes])  # noqa: E731
            return jax.eval_shape(lambda: self._tx.init(zeros()))

        try:
            small = state([leaf.small for leaf in trial.leaves])
            big = state([leaf.big for leaf in trial.leaves])
            return kept_otherwise(small, big, self._plan)
        except Exception:  # a state that has no place in the plan: resize_state says so
            return []


def _message(report: Report, kept: Sequence[str]) -> str:
    """What is not exact, how far off, why as far as it was seen, and what to do."""
    bad = {_tree.name(key): r.apart for key, r in report.responses.items() if r.apart}
    worst = sorted(bad, key=lambda name: -bad[name])[:3]
    found = [f"{name!r} by {bad[name]:.1%}" for name in worst] + [repr(name) for name in kept[:3]]
    return (
        "the big model does not follow the small one's training exactly: this optimizer's update "
        f"on copies is not the copies of its update. On stand-ins: {', '.join(found)}. "
        f"{_reason(report, kept)} To go on as it is: scale_optimizer(tx, plan, check=False)."
    )


def _reason(report: Report, kept: Sequence[str]) -> str:
    if report.coupled:
        return (
            "The update of a leaf depends on the gradients of others, as under clipping by a "
            "global norm. Fix: inside scale_optimizer, us.clip_by_global_norm(max_norm, plan) in "
            "place of optax's."
        )
    if report.uneven or kept:
        return (
            "It takes means or norms over units that are copied unequally often, or keeps other "
            "dimensions for the big model. Fix: sizes that are multiples of the small model's, or "
            "an elementwise optimizer (Adam, Lion, SGD)."
        )
    return "Fix: an elementwise optimizer (Adam, Lion, SGD)."


def _without_ratio(steps: Tree, alone: Tree, plan: Plan, responses: Mapping[Key, Response]) -> Tree:
    """Takes the constant off the part of the updates that they have at parameters 0 alone."""
    keys, leaves, treedef = _tree.flatten_named(steps, is_leaf=is_absent)
    parts = jax.tree.leaves(alone, is_leaf=is_absent)
    owners = fitting(plan, keys, leaves)
    fixed = []
    for step, part, owner in zip(leaves, parts, owners, strict=True):
        response = responses.get(owner.key) if owner is not None else None
        if response is not None and response.affine:
            step = _factors.add_multiple(step, 1 / response.ratio - 1, part)
        fixed.append(step)
    return jax.tree.unflatten(treedef, fixed)
