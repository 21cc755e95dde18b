"""unit_scale_lr: the inverse learning rate as an optax gradient transformation."""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import optax

from uscale_jax import _chain_order, _factors, _tree
from uscale_jax._types import Factor, Tree

# Extra argument by which effective_lr_scale asks for the update without our factors: an array
# that is 1 where the factors act and 0 where they do not.
ACTIVE = "unit_scale_lr_active"


class UnitScaleState(NamedTuple):
    """State of :func:`unit_scale_lr` with a schedule; without one it is ``optax.EmptyState``."""

    unit_scale_count: jax.Array
    """int32 [], updates seen so far."""


def unit_scale_lr(k: Any, *, keep_decay: Any = None) -> optax.GradientTransformationExtraArgs:
    r"""Returns a transformation that divides the updates passing through it by ``k``.

    .. math:: u' = u / k

    Behind an optimizer with learning rate α this is the learning rate α/k, for every optimizer:

    >>> import optax
    >>> import uscale_jax as us
    >>> tx = optax.chain(optax.adam(1e-3), us.unit_scale_lr(2.0))    # α/2

    **In front of an optimizer** it is α/k only if the optimizer is linear in the gradients (SGD,
    momentum).  Adam, Lion, RMSProp, Muon, LAMB, ... normalise the gradients, so a factor in front
    of them cancels: the chain is read at its first update, and if what follows does not pass the
    factor on, an :class:`UnitScaleOrderWarning` says so, once, with the line that works.

    **Decoupled weight decay.**  Behind ``optax.adamw(α, weight_decay=λ)`` the decay is divided as
    well: the chain equals ``adamw(α/k, weight_decay=λ)``, the share of a weight that decays per
    step falls from αλ to αλ/k.  With ``keep_decay=α*λ`` that share stays αλ: the chain equals
    ``adamw(α/k, weight_decay=k*λ)``, which transfers better when the learning rate changes with
    the scale (Wang & Aitchison, 2024).  Standing between the preconditioner and
    ``optax.add_decayed_weights`` has the same effect.

    Args:
      k: a positive finite scalar (Python, NumPy or JAX; traced values and
        ``optax.inject_hyperparams`` are allowed), a schedule ``step -> k``, or a tree prefix of
        the parameters with scalars or schedules.  A prefix fits by name.
      keep_decay: what of each parameter decays per step, α·λ, where that must not change with k:
        a non-negative number, a schedule, or a tree prefix of them (0.0 where the optimizer's
        mask leaves decay out).  None: decay is divided by k like everything else.

    Returns:
      An ``optax.GradientTransformationExtraArgs``.  Updates keep dtype, weak type and sharding;
      those narrower than float32 are multiplied by 1/k in float32 and rounded once.  The state is
      empty, or one int32 count with schedules.

    Raises:
      TypeError, ValueError: ``k`` is not as described (at construction, or when a prefix meets
        its tree); ``keep_decay`` is used without ``params``.

    Example:
      >>> import jax.numpy as jnp
      >>> params = {"w": jnp.array([1.0, -2.0])}
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array([0.3, 5.0])}, state, params)
      >>> updates["w"]
      Array([-0.0005, -0.0005], dtype=float32)

    References:
      Scale and learning rate together: *µnit Scaling*, 2025 (arXiv:2502.05967), Eq. 16, and Yang et
      al., *Tensor Programs V*, 2022 (arXiv:2203.03466), Table 3.  Weight decay: Wang & Aitchison,
      *How to set AdamW's weight decay as you scale model and dataset size*, 2024
      (arXiv:2405.13698).
    """
    factors = _checked(k, "k", _factors.check_factor)
    decays = None if keep_decay is None else _checked(keep_decay, "keep_decay", _check_decay)
    scheduled = any(map(callable, jax.tree.leaves((factors, decays))))

    def init(params: Tree) -> optax.OptState:
        del params  # no shape work: optax initialises with placeholders to find its way around
        return UnitScaleState(jnp.zeros((), jnp.int32)) if scheduled else optax.EmptyState()

    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        if ACTIVE not in extra_args and not (isinstance(factors, float) and factors == 1.0):
            _chain_order.check()
        step = state.unit_scale_count if scheduled else None
        now = _at(factors, step, "k", _factors.check_factor)
        scaled = _divide(updates, now, extra_args.get(ACTIVE))
        if decays is not None:
            shares = _at(decays, step, "keep_decay", _check_decay)
            scaled = _restore_decay(scaled, params, now, shares)
        return scaled, UnitScaleState(optax.safe_increment(step)) if scheduled else state

    return optax.GradientTransformationExtraArgs(init, update)


Check: TypeAlias = Callable[[Any, str], Factor]


def _checked(prefix: Any, what: str, check: Check) -> Any:
    """The prefix with every entry checked, and made a Python float where it is concrete."""
    keys, entries, treedef = _tree.flatten_named(prefix, is_leaf=lambda x: x is None)
    names = [f"{what}[{_tree.name(key)!r}]" if key else what for key in keys]
    pairs = zip(entries, names, strict=True)
    # None stands where the tree has no leaf: jax.tree.map over such a tree makes such a prefix.
    keep = lambda entry: callable(entry) or (entry is None and keys != [()])  # noqa: E731
    checked = [e if keep(e) else check(e, label) for e, label in pairs]
    return jax.tree.unflatten(treedef, checked)


def _check_decay(decay: Any, what: str) -> Factor:
    zero = isinstance(decay, int | float) and decay == 0
    return 0.0 if zero else _factors.check_factor(decay, what)


def _at(prefix: Any, step: jax.Array | None, what: str, check: Check) -> Any:
    """The prefix with every schedule replaced by its value at this step."""
    return jax.tree.map(
        lambda entry: check(entry(step), f"{what}(step)") if callable(entry) else entry, prefix
    )


def _divide(updates: Tree, k: Any, active: jax.Array | None) -> Tree:
    keys, leaves, treedef = _tree.flatten_named(updates)
    ks = _tree.broadcast_prefix(k, updates, keys, what="k")
    pairs = zip(leaves, ks, strict=True)
    return jax.tree.unflatten(treedef, [_divide_leaf(leaf, one, active) for leaf, one in pairs])


def _divide_leaf(update: Any, k: Factor, active: jax.Array | None) -> Any:
    update = jnp.asarray(update)
    if not _factors.is_scaled(update):
        return update
    factor = 1 / k if active is None else _factors.power(1 / k, active)
    return _factors.multiply(update, factor)


def _restore_decay(updates: Tree, params: Tree | None, k: Any, decay: Any) -> Tree:
    """Takes the share (1 − 1/k)·decay·W off the updates, which the division had given back."""
    if params is None:
        raise ValueError(
            "unit_scale_lr(k, keep_decay=...) needs the parameters, got params=None. "
            "Fix: call tx.update(grads, state, params)."
        )
    keys, leaves, treedef = _tree.flatten_named(updates)
    ks = _tree.broadcast_prefix(k, updates, keys, what="k")
    decays = _tree.broadcast_prefix(decay, updates, keys, what="keep_decay")
    # By name: parameters without an update (None) are in params all the same.
    weights = dict(zip(*_tree.flatten_named(params)[:2], strict=True))
    if absent := [_tree.name(key) for key in keys if key not in weights]:
        raise ValueError(
            f"unit_scale_lr(k, keep_decay=...) got updates without parameters: {absent[:8]}. "
            "Expected: params with the structure of the updates. Fix: pass the tree that is "
            "trained."
        )
    rows = zip(leaves, ks, decays, keys, strict=True)
    return jax.tree.unflatten(
        treedef, [_restore_leaf(u, k1, d, weights[key]) for u, k1, d, key in rows]
    )


def _restore_leaf(update: Any, k: Factor, decay: Factor, weight: Any) -> Any:
    if not _factors.is_scaled(update):
        return update
    return _factors.add_multiple(update, (1 / k - 1) * decay, weight)
