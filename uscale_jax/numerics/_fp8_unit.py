"""Unit-scaled products of float8 operands, whose factors are parts of the products."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from uscale_jax.numerics import _fp8, _products, _scale
from uscale_jax.numerics._constraints import Constraint, constrained
from uscale_jax.numerics._formats import Format, FormatLike


@dataclass(frozen=True)
class UnitFp8DotGeneral:
    """What :func:`unit_fp8_dot_general` returns: a ``jax.lax.dot_general`` with settings.

    Two of equal settings are equal, so that models that hold them are compiled once.
    """

    forward: Format
    backward: Format
    constraint: Constraint
    rounded: bool
    dtype: np.dtype[Any] | None

    def __call__(
        self,
        lhs: ArrayLike,
        rhs: ArrayLike,
        dimension_numbers: Any,
        precision: Any = None,
        preferred_element_type: Any = None,
        *,
        out_sharding: Any = None,
    ) -> jax.Array:
        """Return the product; arguments are those of ``jax.lax.dot_general``."""
        factors = self._factors(np.shape(lhs), np.shape(rhs), dimension_numbers)
        dot = _fp8.Fp8DotGeneral(self.forward, self.backward, 1.0, 1.0, 1.0, *factors, self.dtype)
        return dot(
            lhs,
            rhs,
            dimension_numbers,
            precision,
            preferred_element_type,
            out_sharding=out_sharding,
        )

    def _factors(
        self, lhs: tuple[int, ...], rhs: tuple[int, ...], numbers: Any
    ) -> tuple[float, float, float]:
        """Of the output and of the gradients of lhs and rhs."""
        operands = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in (lhs, rhs)]
        plain = partial(lax.dot_general, dimension_numbers=numbers)
        out = jax.eval_shape(plain, *operands).size  # refuses what does not fit
        terms = out * math.prod(lhs[dim] for dim in numbers[0][0])
        output, grad, weight = _products.term_factors(terms, out, math.prod(lhs), math.prod(rhs))
        output, grad = constrained(self.constraint, output, grad)
        if _scale.gradients_are_true():
            grad = weight = output
        rounding = _power_of_two if self.rounded else float
        return rounding(output), rounding(grad), rounding(weight)


def unit_fp8_dot_general(
    forward: FormatLike = "float8_e4m3fn",
    backward: FormatLike = "float8_e5m2",
    *,
    constraint: Constraint = "to_output_scale",
    rounded: bool = True,
    dtype: Any = None,
) -> UnitFp8DotGeneral:
    r"""Returns a ``jax.lax.dot_general`` at scale one, whose three products are of float8 operands.

    .. math:: Y = s\,Q_f(X)\,Q_f(W), \quad \bar X = b\,Q_b(\bar Y)\,Q_f(W)^\top, \quad
              \bar W = \text{rows}^{-1/2}\, Q_f(X)^\top Q_b(\bar Y), \qquad
              s = \text{contracted}^{-1/2}, \; b = \text{columns}^{-1/2}

    for weights of scale one: the factors of :func:`dot_general`, with Q the cast that saturates,
    :func:`saturating_cast`.  They are the multipliers of ``us.fp8_dot_general``, and so no passes
    of their own: on GPUs a part of each product.  What is cast has scale one as it is, so nothing
    scales it before.

    **Rounded** factors are the nearest powers of two, so that what would start at scale one starts
    at 2^-½ to 2^½; at one where what is summed over, or the number of columns or rows, is a power
    of 4.  In bfloat16 that is faster: results leave the product as such, of the same value, where
    they else leave it as float32, to be rounded by a pass that follows (``us.fp8_dot_general``).

    Args:
      forward: Q_f's format, of 8 bits: of activations and weights.
      backward: Q_b's, of incoming gradients.
      constraint: of s and b, as for :func:`constrained`; that of the weight's gradient is free.
      rounded: whether factors are rounded, after the constraint.
      dtype: the result's where a call names no ``preferred_element_type``; None: the operands'.

    Returns:
      A function with the arguments of ``jax.lax.dot_general`` (activations first), for
      ``dot_general=`` of Flax's layers.  As ``us.fp8_dot_general``'s, it raises TypeError for
      operands that are not floating, or float8 already, and for second derivatives.  Under
      :func:`true_gradients`, all three factors are s.

    Raises:
      ValueError: a format is unknown or not one of 8 bits; there is no such constraint.
      TypeError: ``dtype`` is not floating, or has fewer than 16 bits.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from uscale_jax import numerics as un
      >>> layer = nnx.Linear(
      ...     256,
      ...     64,
      ...     kernel_init=jax.nn.initializers.normal(1.0),
      ...     dot_general=un.unit_fp8_dot_general(),
      ...     rngs=nnx.Rngs(0),
      ... )
      >>> x = jax.random.normal(jax.random.key(1), (32, 256))
      >>> print(f"{jnp.std(layer(x)):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.1; *u-µP*, 2024
      (arXiv:2407.17465), Section 4, and *µnit Scaling*, 2025 (arXiv:2502.05967): the same formats.
    """
    dot = _fp8.fp8_dot_general(forward, backward, dtype=dtype)
    constrained(constraint, 1.0, 1.0)  # refuses what is none
    return UnitFp8DotGeneral(dot.forward, dot.backward, constraint, bool(rounded), dot.dtype)


def fp8_linear(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    constraint: Constraint = "to_output_scale",
    forward: FormatLike = "float8_e4m3fn",
    backward: FormatLike = "float8_e5m2",
    dtype: Any = None,
    rounded: bool = True,
) -> jax.Array:
    r"""Returns a linear layer at scale one, whose three products are of float8 operands.

    .. math:: Y = s\,Q_f(X)\,Q_f(W) + b, \quad \bar X = s'\,Q_b(\bar Y)\,Q_f(W)^\top, \quad
              \bar W = n^{-1/2}\, Q_f(X)^\top Q_b(\bar Y), \quad
              \bar b = n^{-1/2} \textstyle\sum \bar Y

    with s = fan_in^−½, s' = fan_out^−½ and n the number of rows of X: :func:`linear`, with the
    products of :func:`unit_fp8_dot_general`.  The bias is not rounded.

    Args:
      x: activations of shape (..., fan_in), of 16 bits or more.
      w: the weight, of shape (fan_in, fan_out), of scale one.
      b: the bias, of shape (fan_out,), usually zeros at first.
      constraint: of s and s', as for :func:`constrained`; the gradients of w and b have their own.
      forward: Q_f's format, of 8 bits: of activations and weights.
      backward: Q_b's, of incoming gradients.
      dtype: the product's; None: that of the operands.
      rounded: whether s, s' and the factor of the weight's gradient are the nearest powers of two,
        after the constraint: scales are then 2^-½ to 2^½, not 1, and bfloat16 is faster.

    Returns:
      Outputs of shape (..., fan_out).

    Raises:
      TypeError: an operand is not floating, or float8 already; ``dtype`` is not floating or has
        fewer than 16 bits; from JAX, sizes do not contract.
      ValueError: ``w`` is no matrix, ``b`` not of shape (fan_out,), a format is unknown or not one
        of 8 bits, no such constraint.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> x = jax.random.normal(jax.random.key(0), (50, 64))
      >>> w = jax.random.normal(jax.random.key(1), (64, 200))
      >>> exact = un.linear(x, w)
      >>> error = jnp.std(un.fp8_linear(x, w) - exact)
      >>> print(f"{jnp.std(exact):.1f} {error:.2f}")
      1.0 0.04

    References:
      As :func:`unit_fp8_dot_general`.
    """
    dot = unit_fp8_dot_general(
        forward, backward, constraint=constraint, rounded=rounded, dtype=dtype
    )
    inputs, weight = _scale.floating(x, "fp8_linear's x"), _scale.floating(w, "fp8_linear's w")
    if weight.ndim != 2 or inputs.ndim == 0:
        raise ValueError(
            f"fp8_linear got x of shape {inputs.shape} and w of shape {weight.shape}. Expected: "
            "(..., fan_in) and (fan_in, fan_out). Fix: for weights of other shapes, "
            "unit_fp8_dot_general."
        )
    out = dot(inputs, weight, (((inputs.ndim - 1,), (0,)), ((), ())))
    if b is None:
        return out
    rows = max(inputs.size // max(weight.shape[0], 1), 1)
    return out + _products._bias(b, out, rows**-0.5)


def _power_of_two(factor: float) -> float:
    """The nearest one, in ratio."""
    return 2.0 ** round(math.log2(factor))
