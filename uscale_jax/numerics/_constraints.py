"""Which factors of an operation must be one number, and whether a composition is valid."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _tree
from uscale_jax._types import Apply, Tree
from uscale_jax.numerics import _scale

ConstraintName: TypeAlias = Literal[
    "to_output_scale",
    "to_grad_input_scale",
    "to_left_grad_scale",
    "to_right_grad_scale",
    "gmean",
    "hmean",
    "amean",
]

Constraint: TypeAlias = ConstraintName | Callable[..., float] | None
"""What :func:`constrained` takes: a name, a function of the factors to one factor, or None."""

_BY_NAME: Mapping[str, Callable[..., float]] = {
    "to_output_scale": lambda output, *grads: output,
    "to_grad_input_scale": lambda output, grad: grad,
    "to_left_grad_scale": lambda output, left, right: left,
    "to_right_grad_scale": lambda output, left, right: right,
    "gmean": lambda *factors: math.prod(factors) ** (1 / len(factors)),
    "hmean": lambda *factors: len(factors) / sum(1 / s for s in factors),
    "amean": lambda *factors: sum(factors) / len(factors),
}
_GRADS = {"to_grad_input_scale": 1, "to_left_grad_scale": 2, "to_right_grad_scale": 2}
"""How many gradient factors there must be, of the names that pick one of them."""


def constrained(constraint: Constraint, output: float, *grads: float) -> tuple[float, ...]:
    r"""Returns the factors an operation uses, of the ones that would make each of its scales one.

    A tensor that reaches the loss on several paths gets the sum of their gradients.  The sum points
    along the true gradient only if every path has the same product of gradient factors over output
    factors; one number for both, in every operation, makes each of these products 1:

    .. math:: s = b_1 = b_2 = \ldots = c(s, b_1, b_2, \ldots)

    Parameters have no way on behind them: their factors are not constrained.  Whether what comes
    out is valid is measured by :func:`verify_gradients`.

    Args:
      constraint: c.  None changes nothing, for operations that no path goes around (a readout, an
        embedding, what lies outside of residual branches).  "to_output_scale" takes s;
        "to_grad_input_scale" b of the one operand; "to_left_grad_scale" and
        "to_right_grad_scale" b of one of two; "gmean", "hmean" and "amean" the geometric,
        harmonic or arithmetic mean.  Or a function: called as ``c(output, *grads)``, it returns
        one factor.
      output: s, what the output must be multiplied by to have scale one.
      *grads: b of every operand that is no parameter.

    Returns:
      (s, b, ...), as many as were given.

    Raises:
      ValueError: there is no such constraint, it picks the gradient of operands that the operation
        does not have, or what a function returned is no positive finite number.

    Example:
      >>> from uscale_jax import numerics as un
      >>> un.constrained("to_output_scale", 0.25, 1.0)
      (0.25, 0.25)
      >>> un.constrained("gmean", 0.25, 1.0)
      (0.5, 0.5)
      >>> un.constrained(min, 0.25, 1.0)
      (0.25, 0.25)

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Section 4.2 and Appendix E, where
      gmean was the default; *u-µP*, 2024 (arXiv:2407.17465), whose default is "to_output_scale".
    """
    if constraint is None:
        return output, *grads
    choose = _found(constraint, len(grads)) if isinstance(constraint, str) else constraint
    one = _factors.check_factor(choose(output, *grads), f"what constraint {constraint!r} returned")
    return (float(one),) * (1 + len(grads))


def _found(name: str, grads: int) -> Callable[..., float]:
    if name not in _BY_NAME:
        raise ValueError(
            f"there is no constraint {name!r}. Expected: None, a function of factors to one "
            f"factor, or one of {', '.join(map(repr, _BY_NAME))}. Fix: 'to_output_scale' is the "
            "default of every operation that needs one."
        )
    if _GRADS.get(name, grads) != grads:
        raise ValueError(
            f"constraint {name!r} picks the gradient factor of one of {_GRADS[name]} operands, "
            f"this operation has {grads} of them. Expected: 'to_grad_input_scale' for one operand, "
            "'to_left_grad_scale' or 'to_right_grad_scale' for two. Fix: 'to_output_scale' and "
            "the means fit every operation."
        )
    return _BY_NAME[name]


class GradientMatch(NamedTuple):
    """How the unit-scaled gradient of one leaf lies to its true gradient."""

    cosine: float
    """Of the angle between the two: 1 where the leaf is valid, or has no gradient at all."""
    ratio: float
    """The norm of the unit-scaled gradient over that of the true one; NaN where both are 0."""


def verify_gradients(
    f: Apply, params: Tree, *inputs: Any, tolerance: float = 1e-5
) -> dict[str, GradientMatch]:
    r"""Returns how the gradient of every parameter lies to its true gradient; raises if askew.

    .. math:: \cos_p = \frac{\langle g_p, g_p^* \rangle}{\lVert g_p\rVert\,\lVert g_p^*\rVert},
              \qquad r_p = \frac{\lVert g_p\rVert}{\lVert g_p^*\rVert}

    with g what ``jax.grad`` gives and g* the same under :func:`true_gradients`, both in the
    dtypes of the model.  A ratio of any size only scales the learning rate of its leaf (Adam does
    not see it); a cosine below 1 is a gradient of no loss at all.

    Args:
      f: a model or a loss, ``f(params, *inputs)``; of outputs that are no scalars, a weighted sum
        is taken, with normal numbers as weights.
      params: the parameters, any pytree; what is not floating in it is held fixed.  Put inputs
        into it to check their gradients too.
      *inputs: passed on.
      tolerance: how far a cosine may be below 1.  Two gradients in float32 are apart by their
        rounding, some 1e-7; in bfloat16 they need 1e-3.

    Returns:
      :class:`GradientMatch` of each floating leaf, by name.

    Raises:
      ValueError: a cosine is below 1 − ``tolerance``, with the leaves it is so for; or no leaf is
        floating, or no output.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> def block(params, x, constraint):
      ...     h = un.linear(x, params["in"])
      ...     branch, skip = un.residual_split(h, 0.5)
      ...     branch = un.linear(branch, params["up"], constraint=constraint)
      ...     return un.residual_add(un.linear(branch, params["down"]), skip, 0.5)
      >>> keys = jax.random.split(jax.random.key(0), 4)
      >>> x, *weights = [
      ...     jax.random.normal(key, shape)
      ...     for key, shape in zip(keys, [(8, 16), (16, 32), (32, 64), (64, 32)])
      ... ]
      >>> params = dict(zip(["in", "up", "down"], weights))
      >>> found = un.verify_gradients(block, params, x, "to_output_scale")
      >>> print(f"{found['up'].cosine:.4f}")
      1.0000
      >>> un.verify_gradients(block, params, x, None)
      Traceback (most recent call last):
      ...
      ValueError: unit-scaled gradients point elsewhere than the true ones.
        leaf 'in': cosine 0.9..., ratio ...
      ...

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Appendix E: the condition, on cycles of
      a computational graph.
    """
    keys, leaves, treedef = _tree.flatten_named(params)
    moved = [i for i, x in enumerate(leaves) if jnp.issubdtype(jnp.result_type(x), jnp.floating)]
    if not moved:
        raise ValueError(f"params hold no floating leaf among {len(leaves)}. Fix: pass weights.")

    def outputs(values: Sequence[Any]) -> list[jax.Array]:
        full = dict(enumerate(leaves)) | dict(zip(moved, values, strict=True))
        found = jax.tree.leaves(f(jax.tree.unflatten(treedef, full.values()), *inputs))
        return [y for y in map(jnp.asarray, found) if jnp.issubdtype(y.dtype, jnp.floating)]

    at = [jnp.asarray(leaves[i]) for i in moved]
    unit = _gradients(outputs, at)
    with _scale.true_gradients():
        true = _gradients(outputs, at)
    names = [_tree.name(keys[i]) for i in moved]
    matches = [_match(a, b) for a, b in zip(unit, true, strict=True)]
    return _judged(dict(zip(names, matches, strict=True)), tolerance)


def _gradients(
    outputs: Callable[[Sequence[Any]], list[jax.Array]], values: Sequence[jax.Array]
) -> list[np.ndarray[Any, Any]]:
    found, pull = jax.vjp(outputs, values)
    if not found:
        raise ValueError("the function returns nothing floating. Fix: return outputs or a loss.")
    keys = jax.random.split(jax.random.key(0), len(found))
    weights = [
        jax.random.normal(key, y.shape, jnp.float32).astype(y.dtype) if y.ndim else jnp.ones_like(y)
        for key, y in zip(keys, found, strict=True)
    ]
    (gradients,) = pull(weights)
    return [np.asarray(g, np.float64).ravel() for g in gradients]


def _match(unit: np.ndarray[Any, Any], true: np.ndarray[Any, Any]) -> GradientMatch:
    a, b = float(np.linalg.norm(unit)), float(np.linalg.norm(true))
    if a == 0 or b == 0:
        return GradientMatch(float(a == b), a / b if b else math.inf if a else math.nan)
    return GradientMatch(float(np.dot(unit / a, true / b)), a / b)


def _judged(found: dict[str, GradientMatch], tolerance: float) -> dict[str, GradientMatch]:
    bad = {name: match for name, match in found.items() if not match.cosine >= 1 - tolerance}
    if not bad:
        return found
    lines = [
        f"  leaf {name!r}: cosine {match.cosine:.6f}, ratio {match.ratio:.4g}"
        for name, match in bad.items()
    ]
    more = [f"  and {len(lines) - 8} more"] if len(lines) > 8 else []
    advice = (
        f"Expected: cosines of at least 1 - {tolerance:g}. Fix: where paths meet again (residual "
        "branches, operands of attention, a weight used twice), give every operation between "
        "one constraint, 'to_output_scale' by default; None only where nothing leads around it."
    )
    head = "unit-scaled gradients point elsewhere than the true ones."
    raise ValueError("\n".join([head, *lines[:8], *more, advice]))
