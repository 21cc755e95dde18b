"""Losses whose gradients have scale one."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax import _factors, _tree
from uscale_jax._types import Factor
from uscale_jax.numerics._scale import floating, scale_bwd, scale_fwd

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def cross_entropy(
    logits: ArrayLike,
    labels: ArrayLike,
    *,
    mult: Factor = 1.0,
    axis: int = -1,
    reduction: Reduction = "mean",
) -> jax.Array:
    r"""Returns the cross entropy of softmax with integer labels, with a gradient of scale one.

    .. math:: L = -\Big\langle \log \operatorname{softmax}(m z)_{y} \Big\rangle, \qquad
              \bar z = \frac{V}{\sqrt{V - 1}} \big(\operatorname{softmax}(m z) - e_y\big)\, \bar L

    of V classes: the factor that brings flat predictions, those of a :func:`linear_readout` at
    first, to scale one.  (Normal logits get 1.001 of 1000 classes at m = 1, 1.13 at m = 4.)
    Neither m nor the mean over positions reaches the gradient.

    Args:
      logits: z, floating.
      labels: y, integers in the shape of ``logits`` without ``axis``.  One that is no class makes
        the loss NaN: take reduction="none" and leave padding out with ``jnp.where(mask, loss, 0)``.
      mult: m, the inverse of a temperature, a positive finite scalar; it may be traced.
      axis: the dimension of classes.
      reduction: "mean" or "sum" over positions, or "none": gradients are those of the sum.

    Returns:
      L, a scalar, or the loss of every position; in float32, in float64 if the logits are so.

    Raises:
      TypeError: ``logits`` are not floating, ``labels`` not integers.
      ValueError: shapes do not fit, ``mult`` is not positive and finite, no such reduction.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> logits = jnp.zeros((3, 5))
      >>> loss, g = jax.value_and_grad(un.cross_entropy)(logits, jnp.array([0, 1, 4]))
      >>> print(f"{loss:.3f} {jnp.sqrt(jnp.mean(g**2)):.3f}")  # log 5
      1.609 1.000

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2; ``mult``: *u-µP*, 2024
      (arXiv:2407.17465).
    """
    array, classes, axis = _checked(logits, labels, axis)
    n = array.shape[axis]
    z = scale_bwd(array, n / math.sqrt(max(n - 1, 1)))
    scaled = scale_fwd(z.astype(_factors.compute_dtype(z.dtype)), mult)
    exists = (classes >= 0) & (classes < n)  # -1 would count from the end
    index = jnp.expand_dims(jnp.where(exists, classes, 0), axis)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(scaled, axis), index, axis).squeeze(axis)
    each = jnp.where(exists, -chosen, jnp.asarray(jnp.nan, chosen.dtype))
    return _reduced(each, reduction)


def mse(prediction: ArrayLike, target: ArrayLike, *, reduction: Reduction = "mean") -> jax.Array:
    r"""Returns the mean squared error, with gradients of scale one.

    .. math:: L = \langle (x - y)^2 \rangle, \qquad
              \bar x = 8^{-1/2}\, 2\,(x - y)\,\bar L = -\bar y

    for independent x and y of scale one, whose difference has √2.  The mean does not reach the
    gradient.

    Args:
      prediction: x, floating.
      target: y, floating, of the same shape.
      reduction: "mean" or "sum" over elements, or "none": gradients are those of the sum.

    Returns:
      L, a scalar, or the loss of every element; in float32, in float64 if an operand is so.

    Raises:
      TypeError: an operand is not floating.
      ValueError: shapes are not equal, no such reduction.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> loss, g = jax.value_and_grad(un.mse)(jnp.array([1.0, 2.0]), jnp.array([1.0, 4.0]))
      >>> print(f"{loss:.1f}", g.round(3))
      2.0 [ 0.    -1.414]

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257).
    """
    x, y = floating(prediction, "mse's prediction"), floating(target, "mse's target")
    if x.shape != y.shape:
        raise ValueError(
            f"mse got a prediction of shape {x.shape} and a target of {y.shape}. Expected: equal "
            "shapes. Fix: reshape one of them."
        )
    wide = _factors.compute_dtype(jnp.result_type(x, y))
    left, right = (scale_bwd(operand, 8**-0.5).astype(wide) for operand in (x, y))
    return _reduced(jnp.square(left - right), reduction)


def _reduced(each: jax.Array, reduction: Reduction) -> jax.Array:
    if reduction == "none":
        return each
    if reduction == "sum":
        return jnp.sum(each)
    if reduction != "mean":
        raise ValueError(f"reduction must be 'mean', 'sum' or 'none', got {reduction!r}.")
    return scale_fwd(jnp.sum(each), 1 / max(each.size, 1))


def _checked(logits: ArrayLike, labels: ArrayLike, axis: int) -> tuple[jax.Array, jax.Array, int]:
    array, classes = floating(logits, "cross_entropy's logits"), jnp.asarray(labels)
    if not jnp.issubdtype(classes.dtype, jnp.integer):
        raise TypeError(f"cross_entropy's labels must be integers, got {_tree.describe(labels)}.")
    if not -array.ndim <= axis < array.ndim:
        raise ValueError(f"axis={axis} is no dimension of logits of shape {array.shape}.")
    axis %= array.ndim
    positions = array.shape[:axis] + array.shape[axis + 1 :]
    if classes.shape != positions:
        raise ValueError(
            f"cross_entropy's labels have shape {classes.shape}. Expected: {positions}, that of "
            "logits without the dimension of classes. Fix: one integer a position, not one-hot "
            "vectors."
        )
    return array, classes, axis
