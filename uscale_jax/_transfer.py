"""transfer: initial values, learning rates, ε and decay of a large model, from those of a small."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from uscale_jax import _transfer_facts, _transfer_rules, _transfer_shapes, _tree
from uscale_jax._plan import Plan
from uscale_jax._transfer_result import LeafTransfer, Transfer
from uscale_jax._transfer_rules import FIXED, Factors, Named, Schedule
from uscale_jax._types import Key, Tree
from uscale_jax.trace.uses import SUMMED


def transfer(
    plan: Plan | tuple[Tree, Tree],
    rule: str = "mup",
    *,
    optimizer: str = "adam",
    initial: tuple[Tree, Tree] | None = None,
    batch: float = 1.0,
    tokens: float = 1.0,
) -> Transfer:
    r"""Returns how the hyper-parameters of a small model become those of a large one.

    Tune learning rate, ε and weight decay on the small model of a plan, the base, and train the
    large one, the target, from scratch with the factors that a rule gives its leaves.  What kind
    a leaf is (hidden, output, input, vector) is read off the traced programs: which of its axes
    grow, and which of those products sum over.  Neither names nor numbers of dimensions matter.

    With r_in, r_out by how much fan-in and fan-out grow, m the factor of growth by copies
    (:func:`plan`; 1/r_in where products sum over inputs that grew, and what constants in the model
    call for) and n of how many elements each becomes, ``"mup"`` is

    .. math::
      \sigma' = \sigma\, m \sqrt{r_{\mathrm{in}}}\ \text{(hidden)},\quad
      \sigma' = \sigma\, m\ \text{(else)},\qquad
      \alpha' = m\,\alpha,\quad \varepsilon' = \frac{\varepsilon}{m n},\quad
      \lambda' = \frac{\lambda}{m}

    so that the factors of learning rate, ε and decay are those under which a grown model follows
    the small one step by step.  Where heads grow, m holds the 1/d of attention scores, whatever
    power of d the model divides them by.

    ==========================  ===================================================================
    ``"mup"``                   Table 3 of Tensor Programs V: nothing to change in the model
    ``"mup_multipliers"``       its Table 8: readouts keep scale and rate, behind a multiplier of
                                1/r_in (``Transfer.apply``)
    ``"u_mup"``                 weights of scale 1 behind multipliers of 1/√fan_in, 1/fan_in for
                                readouts; looked-up tables learn with 1/√d.  Widths are the
                                target's own: what is tuned is tuned with them too, and both on
                                plans from one model that is smaller still
    ``"depth_mup"``             residual branches of L^-½, learning rates L^-½ in them
    ``"completep"``             residual branches of 1/L, learning rates unchanged;
    ``"completep_multipliers"`` the latter in multipliers.  All three need ``plan(..., depth=)``
    ``"spectral"``              the norms of fresh matrices and of updates are √(fan_out/fan_in)
    ``"standard"``              variances of 1/fan_in, one learning rate: what the others improve on
    ``"standard_lr"``           the same with 1/r_in (full alignment) or, ``"standard_lr_none"``,
                                1/√r_in (no alignment) on what sums over inputs that grew
    ==========================  ===================================================================

    **What is not agreed on.**  ε of embeddings: CompleteP leaves it, Complete(d)P divides it by
    the width, as gradients do; so it is here.  Decay: over widths α·λ is kept, as Wang & Aitchison
    find best and CompleteP does; Kosson et al. (arXiv:2510.19093) take that for the reason why
    rates transfer at all, arXiv:2510.15262 has λ grow by √r instead.  Whether μP or standard
    initialisation with learning rates per layer ends lower: Everett et al. find the latter.  The
    default is μP, for its factors are those of growth, which is exact.

    Args:
      plan: what :func:`plan` returned, for the base and the target model; shapes are enough.  Or
        two trees of parameters or shapes, ``(base, target)``, of kernels (..., inputs, outputs):
        nothing is traced then, and what shapes do not tell is refused or said in a note.
      rule: one of the above.
      optimizer: ``"adam"`` (and all whose updates do not know how large gradients are: RMSProp,
        Adagrad), ``"lion"``, ``"sgd"``, ``"adafactor"`` (and all whose updates are as large as
        weights: LAMB, LARS), ``"muon"``, ``"muon_rms"`` (with ``consistent_rms``).
      initial: initial values of the base and of the target, whose standard deviations are
        compared.  Without it kernels are taken to start with variances of 1/fan_in and all else
        alike, which is what Flax's layers do, but for ``Embed`` (1/features).
      batch: by how much the batch grows.
      tokens: by how much the tokens of the whole training grow.  Learning rates and decay take
        √(batch/tokens), ε its inverse, and β ``Transfer.beta`` (Complete(d)P; of Adam and Lion).

    Returns:
      A :class:`Transfer`: trees of factors like the target's parameters (``init``,
      ``learning_rate``, ``epsilon``, ``weight_decay``, ``multipliers``), and for
      ``print`` a table with the reason for each.  ``us.scale_params(target_init, rule.init)`` and
      ``us.scale_optimizer(tx, rule)`` apply it; rules with multipliers need
      ``rule.apply(apply)`` too.

    Raises:
      ValueError: no such rule or optimizer; the plan was read from JSON; ``initial`` is of other
        models; a rule of depth for a plan whose new layers are no identities, which tell where
        residual branches end.

    Example:
      >>> import jax, jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     return jnp.tanh(jnp.tanh(x @ params["in"]) @ params["mid"]) @ params["out"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> shapes = lambda n: {"in": f32(5, n), "mid": f32(n, n), "out": f32(n, 3)}
      >>> rule = us.transfer(us.plan(apply, shapes(8), apply, shapes(32), f32(2, 5)))
      >>> rule.learning_rate
      {'in': 1.0, 'mid': 0.25, 'out': 0.25}
      >>> tx = us.scale_optimizer(optax.adamw(1e-3), rule)

    References:
      Yang et al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Tables 3 and 8; *Tensor Programs
      VI*, 2023 (arXiv:2310.02244); Blake et al., *u-μP*, 2024 (arXiv:2407.17465), Table 2; Dey et
      al., *CompleteP*, 2025 (arXiv:2505.01618), Table 1; Yang et al., *A Spectral Condition for
      Feature Learning*, 2023 (arXiv:2310.17813); Everett et al., *Scaling Exponents Across
      Parameterizations and Optimizers*, 2024 (arXiv:2407.05872); Wang & Aitchison, 2024
      (arXiv:2405.13698); *Complete(d)P*, 2025 (arXiv:2512.22382).
    """
    named = _named(rule, optimizer)
    schedule = _schedule(batch, tokens, optimizer)
    plan, model = _read(plan, rule, named)
    _check_growth(rule, named, model)
    _check_depth(rule, named, model)
    starts = None if initial is None else _Starts(plan, initial)
    leaves = [_leaf(known, named, optimizer, schedule, starts) for known in model.leaves]
    return Transfer(
        rule=rule,
        optimizer=optimizer,
        plan=plan,
        leaves={leaf.name: leaf for leaf in leaves},
        places=() if named.plain else model.places,
        notes=(*model.notes, *_notes(named, model, starts, leaves)),
        schedule=schedule,
    )


def _named(rule: str, optimizer: str) -> Named:
    for what, name, known in (
        ("rule", rule, _transfer_rules.RULES),
        ("optimizer", optimizer, _transfer_rules.OPTIMIZERS),
    ):
        if not isinstance(name, str) or name not in known:
            raise ValueError(
                f"{what} is {name!r}. Expected: one of {', '.join(map(repr, known))}. Fix: name "
                "the one that is meant."
            )
    return _transfer_rules.RULES[rule]


def _read(
    plan: Plan | tuple[Tree, Tree], rule: str, named: Named
) -> tuple[Plan, _transfer_facts.Model]:
    if isinstance(plan, Plan):
        return plan, _transfer_facts.facts(plan)
    if (named.absolute or named.deep) and isinstance(plan, tuple):
        raise ValueError(
            f"rule {rule!r} needs to know what is looked up and where residual branches end, which "
            "shapes do not tell. Expected: a plan. Fix: us.transfer(us.plan(base_apply, base, "
            f"target_apply, target, *inputs), {rule!r})."
        )
    if not isinstance(plan, tuple | list) or len(plan) != 2:
        raise ValueError(
            f"plan is {type(plan).__name__!r}. Expected: what us.plan returned, or two trees of "
            "parameters or shapes. Fix: us.transfer(us.plan(base_apply, base, target_apply, "
            "target, *inputs))."
        )
    return _transfer_shapes.facts(*plan)


def _schedule(batch: float, tokens: float, optimizer: str) -> Schedule:
    for name, value in (("batch", batch), ("tokens", tokens)):
        number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
        if not (number and 0 < value < float("inf")):
            raise ValueError(
                f"{name} is {value!r}. Expected: by how much it grows, a positive number. Fix: "
                f"{name}=2.0 for twice as much."
            )
    if (batch, tokens) != (1, 1) and optimizer not in ("adam", "lion"):
        raise ValueError(
            f"batch and tokens with optimizer={optimizer!r}: the rule for them is derived for "
            "Adam. Expected: optimizer='adam'. Fix: leave them out, and tune the learning rate."
        )
    return Schedule(float(batch), float(tokens))


def _check_growth(rule: str, named: Named, model: _transfer_facts.Model) -> None:
    if named.absolute and all(known.facts.role == FIXED for known in model.leaves):
        raise ValueError(
            f"rule {rule!r} goes by which axes grow, and none does from one model of the plan to "
            "the other. Expected: a plan from a smaller model. Fix: us.plan(...) from one that is "
            "smaller than all that are compared: factors are of the larger one's widths alone."
        )


def _check_depth(rule: str, named: Named, model: _transfer_facts.Model) -> None:
    if named.deep and model.grows_in_depth and not model.branches:
        raise ValueError(
            f"rule {rule!r} scales residual branches, and where those end is not known: in this "
            "plan new layers are not made identities. Expected: layers whose branches end with "
            "kernels that silence them, as pre-norm blocks have. Fix: us.plan(..., depth=..., "
            "new_layers='identity') says what is in the way; 'mup' is about width alone."
        )
    if named.deep and model.normed:
        raise ValueError(
            f"rule {rule!r} scales residual branches by what they end with, and a norm behind "
            f"{', '.join(model.normed[:4])} takes that off again. Expected: branches that end "
            "with kernels. Fix: multiply the branches in the model, and use 'mup'."
        )


class _Starts:
    """Standard deviations of initial values, by key."""

    def __init__(self, plan: Plan, initial: tuple[Tree, Tree]) -> None:
        if not isinstance(initial, tuple | list) or len(initial) != 2:
            raise ValueError(f"initial is {type(initial).__name__!r}. {_INITIAL}")
        base = {leaf.source: leaf.small for leaf in plan.leaves.values()}
        target = {leaf.key: leaf.big for leaf in plan.leaves.values()}
        self.base = _deviations(initial[0], base, "base")
        self.target = _deviations(initial[1], target, "target")


_INITIAL = (
    "Expected: initial=(parameters of the base, of the target), arrays. Fix: pass the trees that "
    "were initialised, the base's first."
)


def _deviations(tree: Tree, shapes: Mapping[Key, tuple[int, ...]], what: str) -> dict[Key, float]:
    keys, leaves, _ = _tree.flatten_named(tree)
    given = {key: getattr(leaf, "shape", None) for key, leaf in zip(keys, leaves, strict=True)}
    odd = [_tree.name(k) for k in {**given, **shapes} if given.get(k) != shapes.get(k)]
    odd += [_tree.name(k) for k, x in zip(keys, leaves, strict=True) if not _is_array(x)]
    if odd:
        raise ValueError(
            f"initial values of the {what} are not those of the plan's models, or no arrays: "
            f"{', '.join(odd[:8])}. {_INITIAL}"
        )
    return dict(zip(keys, map(_deviation, leaves), strict=True))


def _is_array(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray | np.generic)


def _deviation(leaf: Any) -> float:
    if not jax.numpy.issubdtype(leaf.dtype, jax.numpy.floating):
        return 0.0
    return float(np.std(np.asarray(leaf, np.float64)))


def _leaf(
    known: _transfer_facts.Known,
    named: Named,
    optimizer: str,
    schedule: Schedule,
    starts: _Starts | None,
) -> LeafTransfer:
    leaf, facts = known.leaf, known.facts
    factors = named.rule(facts) if leaf.floating else Factors()
    own = _starts_at(known, named.absolute, starts) if leaf.floating else 1.0
    family = _transfer_rules.OPTIMIZERS[optimizer]
    timed = schedule.of(factors) if leaf.floating else factors
    lr = family.lr(facts, factors) * timed.lr / factors.lr
    return LeafTransfer(
        name=leaf.name,
        key=leaf.key,
        facts=facts,
        factors=timed,
        learning_rate=lr,
        # Where updates are as large as weights, so is what decays, whatever frame they are in.
        weight_decay=1.0 if family.q else timed.lr * timed.weight_decay / lr,
        init=factors.init / own,
        why=known.why,
        dims=known.dims,
    )


def _starts_at(known: _transfer_facts.Known, absolute: bool, starts: _Starts | None) -> float:
    """The deviation that the target's own initial values have: its own, or by the base's."""
    if starts is not None:
        base, target = starts.base[known.leaf.source], starts.target[known.leaf.key]
        if not base or not target:
            return 1.0
        return target if absolute else target / base
    if known.dims and SUMMED not in known.dims:  # a gain of a kernel
        return 1.0
    fan_in = known.facts.fan_in
    return 1 / np.sqrt(fan_in.target) if absolute else 1 / np.sqrt(fan_in.ratio)


def _notes(
    named: Named,
    model: _transfer_facts.Model,
    starts: _Starts | None,
    leaves: Sequence[LeafTransfer],
) -> list[str]:
    notes = [
        f"the result at {place.source} must be multiplied by {place.factor:g}: rule.apply(apply)"
        for place in (() if named.plain else model.places)
    ]
    pairs = zip(model.leaves, leaves, strict=True)
    shifted = [x.name for known, x in pairs if known.leaf.shift and np.any(np.asarray(x.init) != 1)]
    if shifted:
        notes.append(
            f"read as c + leaf, so that factors of init are of the sum: {', '.join(shifted)}; "
            "rule.start(params) does that"
        )
    if model.grows_in_depth and not named.deep:
        notes.append(
            "there are more layers, of which this rule says nothing: 'depth_mup' and 'completep' do"
        )
    if starts is None:
        notes.append(
            "init: taken for granted that kernels start with variances of 1/fan_in, and all else "
            "with the same in both; initial=(base, target) measures it"
        )
    return notes
