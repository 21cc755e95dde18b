"""clip_by_global_norm: the norm of the small model's gradients, in its frame."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from uscale_jax import _factors, _tree
from uscale_jax._optimizer_probe import COPIES
from uscale_jax._places import fitting, prefixes
from uscale_jax._plan import Plan
from uscale_jax._powers import Terms, is_scaled, terms, times
from uscale_jax._types import Key, Tree


def clip_by_global_norm(max_norm: Any, plan: Plan) -> optax.GradientTransformationExtraArgs:
    r"""Returns ``optax.clip_by_global_norm`` for use inside :func:`scale_optimizer`.

    A global norm in the small model's frame counts every copy.  Here each counts for 1/n,

    .. math:: \lVert g \rVert^2 = \sum_{\mathrm{leaves}} \sum_i \frac{|g_i|^2}{n_i}

    which is the small model's norm as long as copies are equal.

    Args:
      max_norm: what the norm is clipped to.
      plan: the plan that ``scale_optimizer`` has.

    Returns:
      An ``optax.GradientTransformationExtraArgs`` with an empty state.  On gradients of the small
      model's shapes it is ``optax.clip_by_global_norm``.

    Raises:
      ValueError: at first use, where the tree is that of neither of the plan's models.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> import uscale_jax as us
      >>> apply = lambda params, x: (x @ params["in"]) @ params["out"]
      >>> shapes = lambda n: {"in": jnp.ones((5, n)), "out": jnp.ones((n, 3))}
      >>> plan = us.plan(apply, shapes(4), apply, shapes(8), jnp.ones((2, 5)))
      >>> tx = optax.chain(us.clip_by_global_norm(1.0, plan), optax.adam(0.1))
      >>> tx = us.scale_optimizer(tx, plan)
      >>> state = tx.init(shapes(8))

    References:
      Pascanu et al., *On the difficulty of training recurrent neural networks*, 2013
      (arXiv:1211.5063).
    """

    def update(
        updates: Tree, state: optax.OptState, params: Tree | None = None, **extra_args: Any
    ) -> tuple[Tree, optax.OptState]:
        del params
        keys, leaves, _ = _tree.flatten_named(updates)
        known = extra_args.get(COPIES)
        weights = (
            _weights(plan, keys, leaves)
            if known is None
            else [(1 / np.asarray(known[key]),) for key in keys]
        )
        norm = _norm(leaves, weights)
        return jax.tree.map(lambda x: _clipped(x, norm, max_norm), updates), state

    return optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)


def _weights(plan: Plan, keys: Sequence[Key], leaves: Sequence[Any]) -> list[Terms]:
    """1/n of every leaf of the big model; 1 of the small one's."""
    shapes = {leaf.source: leaf.small for leaf in plan.leaves.values()}
    for prefix in prefixes(shapes):
        names = [(*prefix, *key) for key in keys]
        if all(shapes.get(k) == x.shape for k, x in zip(names, leaves, strict=True)):
            return [()] * len(keys)
    owners = fitting(plan, keys, leaves)
    return [() if owner is None else terms(owner, n=-1) for owner in owners]


def _norm(leaves: Sequence[Any], weights: Sequence[Terms]) -> jax.Array:
    """The norm over all floating leaves, in the widest of their dtypes and at least in float32."""
    squares = [_square(x, w) for x, w in zip(leaves, weights, strict=True) if is_scaled(x)]
    wide = max((x.dtype for x in squares), key=lambda dtype: jnp.finfo(dtype).bits, default=None)
    return jnp.sqrt(sum((x.astype(wide) for x in squares), jnp.zeros((), wide)))


def _square(x: Any, weights: Terms) -> jax.Array:
    wide = jnp.abs(x.astype(_factors.compute_dtype(x.dtype)))
    return jnp.sum(times(jnp.square(wide), weights))


def _clipped(x: Any, norm: jax.Array, max_norm: Any) -> jax.Array:
    if not is_scaled(x):
        return x
    limit = jnp.asarray(max_norm, norm.dtype)
    return _factors.multiply(x, jnp.where(norm < limit, jnp.ones_like(norm), limit / norm))
