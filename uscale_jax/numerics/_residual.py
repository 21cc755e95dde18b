"""Sums and residual branches at scale one."""

from __future__ import annotations

import itertools
import math
import operator

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax._factors import check_factor, compute_dtype
from uscale_jax._types import Factor
from uscale_jax.numerics._constraints import Constraint, constrained
from uscale_jax.numerics._products import term_factors
from uscale_jax.numerics._scale import floating, scale_bwd, scale_fwd, static


def add(a: ArrayLike, b: ArrayLike, *, constraint: Constraint = "to_output_scale") -> jax.Array:
    r"""Returns the sum at scale one of two tensors.

    .. math:: y = s\,(a + b), \quad \bar a = s_a \textstyle\sum \bar y, \quad
              \bar b = s_b \textstyle\sum \bar y, \qquad
              s = 2^{-1/2}, \; s_a = \Big(\frac{\text{size of } a}{\text{size of } y}\Big)^{1/2}

    with the sums over what was broadcast.  Adding a number, or an array of one element, is not
    scaled: s = 1.  A parameter that is broadcast (a bias, positions) wants ``constraint=None``: at
    the default its gradient has the scale of all that it is added to.

    Args:
      a: a floating array, or a Python number.
      b: likewise, of a shape that broadcasts.
      constraint: of s, s_a ("left") and s_b ("right"), as for :func:`constrained`.

    Returns:
      The sum.

    Raises:
      TypeError: an operand is not floating.
      ValueError: there is no such constraint; from JAX, shapes do not broadcast.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(un.add(jnp.array([1.0, 2.0]), jnp.array([1.0, -1.0])).round(3))
      [1.414 0.707]

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.1.
    """
    if isinstance(a, int | float) or isinstance(b, int | float):
        return jnp.add(a, b)
    left, right = floating(a, "add's a"), floating(b, "add's b")
    shape = jnp.broadcast_shapes(left.shape, right.shape)
    grads = term_factors(math.prod(shape), left.size, right.size)
    output = 1.0 if 1 in (left.size, right.size) else 2**-0.5
    s, left_grad, right_grad = constrained(constraint, output, *grads)
    return _sum(shape, (scale_bwd(left, left_grad), s), (scale_bwd(right, right_grad), s))


def residual_split(x: ArrayLike, tau: Factor) -> tuple[jax.Array, jax.Array]:
    r"""Returns the input of a residual branch and the skip connection around it.

    .. math:: \bar x = \frac{\tau\, \bar x_{\text{branch}} + \bar x_{\text{skip}}}
                             {\sqrt{1 + \tau^2}}

    Forward, both are x.  With :func:`residual_add` it weighs the branch by τ in both directions;
    backward, the weight comes after the branch, which so sees a gradient of scale one.

    Args:
      x: a floating array.
      tau: τ, a positive finite scalar, that of the branch over that of the skip connection; it
        may be traced (:func:`residual_taus` under ``jax.lax.scan``).

    Returns:
      (branch, skip).

    Raises:
      TypeError: ``x`` is not floating, ``tau`` no real number.
      ValueError: ``tau`` is zero, negative, NaN, infinite or not a scalar.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> def layer(x, w, tau):
      ...     branch, skip = un.residual_split(x, tau)
      ...     return un.residual_add(un.silu(un.linear(branch, w)), skip, tau)
      >>> x, w = jax.random.normal(jax.random.key(0), (2, 64, 64))
      >>> print(f"{jnp.sqrt(jnp.mean(layer(x, w, 0.5) ** 2)):.1f}")
      1.0

    References:
      *u-µP*, 2024 (arXiv:2407.17465), Appendix G; Blake et al., *Unit Scaling*, 2023
      (arXiv:2303.11257), with another meaning of τ.
    """
    array = floating(x, "residual_split's x")
    branch, skip = _residual_factors(tau)
    return scale_bwd(array, branch), scale_bwd(array, skip)


def residual_add(branch: ArrayLike, skip: ArrayLike, tau: Factor) -> jax.Array:
    r"""Returns the sum at scale one of a residual branch and its skip connection.

    .. math:: y = \frac{\tau\, x_{\text{branch}} + x_{\text{skip}}}{\sqrt{1 + \tau^2}}, \qquad
              \bar x_{\text{branch}} = \bar x_{\text{skip}} = \bar y

    The factors of gradients are in :func:`residual_split`.

    Args:
      branch: what came out of the branch, a floating array of scale one.
      skip: the skip connection, of the same shape.
      tau: τ, as given to :func:`residual_split`.

    Returns:
      The sum, added up at least in float32 and rounded once.

    Raises:
      TypeError or ValueError: as :func:`residual_split`.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.residual_add(5.0, 5.0, 0.75):.1f}")
      7.0

    References:
      *u-µP*, 2024 (arXiv:2407.17465), Appendix G.
    """
    factors = _residual_factors(tau)
    pair = floating(branch, "residual_add's branch"), floating(skip, "residual_add's skip")
    if pair[0].shape != pair[1].shape:
        raise ValueError(
            f"residual_add got a branch of shape {pair[0].shape} and a skip connection of "
            f"{pair[1].shape}. Expected: equal shapes. Fix: project one of them."
        )
    return _sum(pair[0].shape, *zip(pair, factors, strict=True))


def residual_taus(
    layers: int, residual_mult: float = 1.0, residual_attn_ratio: float = 1.0
) -> tuple[tuple[float, float], ...]:
    r"""Returns τ of the two residual branches of every Transformer layer.

    .. math::

       \tau_i = \alpha_i \Big/ \sqrt{L + {\textstyle\sum_{j<i}} \alpha_j^2}, \qquad
       \alpha_{\text{attn}} = \rho\,\alpha_{\text{mlp}}, \quad
       \alpha_{\text{attn}}^2 + \alpha_{\text{mlp}}^2 = 2\alpha^2

    for branches i = 0, 1, ... of L layers, attention and MLP by turns.  So to the variance of the
    stream, all attention branches contribute α_attn² times what the embedding does, all MLPs
    α_mlp² times, whatever the depth, and each layer as much as any other.

    Args:
      layers: L.  (Graphcore's function counts branches, 2·L.)
      residual_mult: α, the contribution of branches over that of the embedding.
      residual_attn_ratio: ρ, the contribution of attention over that of the MLPs.

    Returns:
      (τ of attention, τ of the MLP) of every layer; as an array of shape (layers, 2), something to
      run ``jax.lax.scan`` over.

    Raises:
      TypeError: ``layers`` is no integer, a multiplier is traced.
      ValueError: ``layers`` or a multiplier is not positive.

    Example:
      >>> from uscale_jax import numerics as un
      >>> for attention, mlp in un.residual_taus(2):
      ...     print(f"{attention:.3f} {mlp:.3f}")
      0.707 0.577
      0.500 0.447

    References:
      *u-µP*, 2024 (arXiv:2407.17465), Appendix G.
    """
    count = operator.index(layers)
    if count < 1:
        raise ValueError(f"layers must be positive, got {layers}.")
    mult, ratio = static(residual_mult, "residual_mult"), static(residual_attn_ratio, "ratio")
    mlp = mult * math.sqrt(2 / (1 + ratio**2))
    squares = [(ratio * mlp) ** 2, mlp**2] * count
    before = itertools.accumulate(squares, initial=float(count))
    taus = [math.sqrt(own / sum_) for own, sum_ in zip(squares, before, strict=False)]
    return tuple(zip(taus[::2], taus[1::2], strict=True))


def _residual_factors(tau: Factor) -> tuple[Factor, Factor]:
    """Of the branch and of the skip connection: their squares add up to 1."""
    checked = check_factor(tau, "tau")
    if isinstance(checked, float):
        return checked / math.hypot(1, checked), 1 / math.hypot(1, checked)
    skip = jax.lax.rsqrt(1 + jnp.square(checked))
    return checked * skip, skip


def _sum(shape: tuple[int, ...], *terms: tuple[jax.Array, Factor]) -> jax.Array:
    """The weighted sum of tensors that broadcast to ``shape``, rounded once."""
    dtype = jnp.result_type(*(x for x, _ in terms))
    wide = compute_dtype(dtype)
    first, second = (scale_fwd(jnp.broadcast_to(x.astype(wide), shape), s) for x, s in terms)
    return (first + second).astype(dtype)
