"""Activation functions at scale one: the factors of any function, by quadrature."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax.numerics import _quadrature
from uscale_jax.numerics._constraints import Constraint, constrained
from uscale_jax.numerics._scale import floating, scale_fwd, scaled, static


class ActivationScales(NamedTuple):
    """What brings f(m·x)/m and its gradient to scale one, for normal x."""

    output: float
    """1 / std f(m·x)/m: of the output, about its mean."""
    grad: float
    """1 / RMS f'(m·x): of the gradient."""
    gate: float
    """1 / RMS f(m·x)/m: of the output as a factor of a product, whose mean is 0 anyway."""


def activation_scales(f: Callable[..., Any], mult: float = 1.0) -> ActivationScales:
    r"""Returns the factors that bring an activation function to scale one, for any function.

    .. math::

       \frac{1}{\sqrt{\langle y^2\rangle - \langle y\rangle^2}}, \quad
       \frac{1}{\sqrt{\langle f'(m x)^2 \rangle}}, \quad
       \frac{1}{\sqrt{\langle y^2 \rangle}}, \qquad y = f(m x) / m, \quad x \sim N(0, 1)

    by Gauss-Legendre quadrature on 6144 panels, summed in float64; f and its derivative (by JAX)
    are computed in float64 where it is enabled, else in float32.  The error is below 1e-6 for
    smooth functions and for kinks at multiples of 1/256 (ReLU, ReLU6, hard tanh), 1e-4 for others.
    Results are kept for each function object.

    Args:
      f: a function of one number to one number, which JAX can differentiate; functions of arrays
        by element fit.
      mult: m, a positive finite Python number: large m makes GELU and SiLU nearly ReLU, small m
        nearly linear.

    Returns:
      :class:`ActivationScales`.

    Raises:
      TypeError: ``mult`` is traced or no number, f does not return one floating number.
      ValueError: ``mult`` is not positive and finite, f is infinite or NaN within 12 standard
        deviations, constant, or flat wherever it is differentiable (a step function).

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> print(" ".join(f"{s:.3f}" for s in un.activation_scales(jax.nn.relu)))
      1.713 1.414 1.414
      >>> print(" ".join(f"{s:.3f}" for s in un.activation_scales(jax.nn.silu)))
      1.787 1.623 1.677

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2, gives the first two for
      ReLU, GELU, SiLU, tanh and sigmoid; *u-µP*, 2024 (arXiv:2407.17465), blends of the limits in
      ``mult``, up to 4 % from what is computed here.
    """
    m = static(mult, "mult")
    moments = _quadrature.function_moments(f, m)
    return ActivationScales(
        m * moments.variance**-0.5, moments.slope**-0.5, m * moments.square**-0.5
    )


def activation(
    f: Callable[..., Any], *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> Callable[[ArrayLike], jax.Array]:
    r"""Returns an activation function at scale one, for any function.

    .. math:: y = s\, f(m x)/m, \qquad \bar x = b\, f'(m x)\,\bar y

    with s = 1 / std f(m·x)/m and b = 1 / RMS f'(m·x) of :func:`activation_scales`, made one number
    by the constraint.  The mean of the output stays (0.68 for ReLU).

    Args:
      f: a function by element, which JAX can differentiate.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      A function of one floating array to one of its shape and dtype.

    Raises:
      TypeError: as :func:`activation_scales`; later, if the array is not floating.
      ValueError: as :func:`activation_scales` and :func:`constrained`.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> softplus = un.activation(jax.nn.softplus)
      >>> print(f"{jnp.std(softplus(jax.random.normal(jax.random.key(0), (10_000,)))):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2.
    """
    m, scales = static(mult, "mult"), activation_scales(f, mult)
    s, b = constrained(constraint, scales.output, scales.grad)
    # Factors of one direction, so that each direction multiplies, and rounds, as little as it can.
    unit = scaled(lambda x: f(scale_fwd(x, m)), s / m, b)
    return lambda x: unit(floating(x, "activation's x"))


def gelu(
    x: ArrayLike,
    *,
    mult: float = 1.0,
    approximate: bool = True,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns GELU at scale one, s·x·Φ(m·x): :func:`activation` of ``jax.nn.gelu``.

    At m = 1, s = 1.701 and b = 1.481.

    Args:
      x: a floating array.
      mult: m, a positive finite Python number.
      approximate: whether to compute Φ by tanh, as in ``jax.nn.gelu``.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError or ValueError: as :func:`activation`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.gelu(1.0):.3f}")
      1.431

    References:
      *Unit Scaling* (arXiv:2303.11257), Table A.2; ``mult``: *u-µP* (arXiv:2407.17465).
    """
    return activation(_GELU[bool(approximate)], mult=mult, constraint=constraint)(x)


def silu(
    x: ArrayLike, *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> jax.Array:
    r"""Returns SiLU at scale one, s·x·σ(m·x): :func:`activation` of ``jax.nn.silu``.

    At m = 1, s = 1.787 and b = 1.623.

    Args:
      x: a floating array.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError or ValueError: as :func:`activation`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.silu(1.0):.3f}")
      1.307

    References:
      *Unit Scaling* (arXiv:2303.11257), Table A.2; ``mult``: *u-µP* (arXiv:2407.17465).
    """
    return activation(jax.nn.silu, mult=mult, constraint=constraint)(x)


def relu(
    x: ArrayLike, *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> jax.Array:
    r"""Returns ReLU at scale one, s·max(x, 0): :func:`activation` of ``jax.nn.relu``.

    s = √(2 / (1 − 1/π)) = 1.713 and b = √2, whatever m.

    Args:
      x: a floating array.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError or ValueError: as :func:`activation`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.relu(1.0):.3f} {un.relu(-1.0):.3f}")
      1.713 0.000

    References:
      *Unit Scaling* (arXiv:2303.11257), Table A.2.
    """
    return activation(jax.nn.relu, mult=mult, constraint=constraint)(x)


def tanh(
    x: ArrayLike, *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> jax.Array:
    r"""Returns tanh at scale one, s·tanh(m·x)/m: :func:`activation` of ``jnp.tanh``.

    At m = 1, s = 1.593 and b = 1.467.

    Args:
      x: a floating array.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError or ValueError: as :func:`activation`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.tanh(1.0):.3f}")
      1.213

    References:
      *Unit Scaling* (arXiv:2303.11257), Table A.2.
    """
    return activation(jnp.tanh, mult=mult, constraint=constraint)(x)


def sigmoid(
    x: ArrayLike, *, mult: float = 1.0, constraint: Constraint = "to_output_scale"
) -> jax.Array:
    r"""Returns the logistic function at scale one, s·σ(m·x)/m: :func:`activation` of it.

    At m = 1, s = 4.801 and b = 4.723; the mean of the output is 2.4.

    Args:
      x: a floating array.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError or ValueError: as :func:`activation`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.sigmoid(0.0):.2f}")
      2.40

    References:
      *Unit Scaling* (arXiv:2303.11257), Table A.2.
    """
    return activation(jax.nn.sigmoid, mult=mult, constraint=constraint)(x)


def glu(
    x: ArrayLike,
    gate: ArrayLike,
    f: Callable[..., Any] = jax.nn.sigmoid,
    *,
    mult: float = 1.0,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns a gated linear unit at scale one, for any gate.

    .. math:: y = s\, x\, f(m g)/m, \quad \bar x = b_x\, \bar y f(m g)/m, \quad
              \bar g = b_g\, \bar y\, x f'(m g)

    with s = b_x = 1 / RMS f(m·g)/m and b_g = 1 / RMS f'(m·g), by quadrature.

    Args:
      x: a floating array.
      gate: g, of a shape that fits ``x``.
      f: a function by element, as for :func:`activation`.
      mult: m, a positive finite Python number.
      constraint: of s, b_x ("left") and b_g ("right"), as for :func:`constrained`.

    Returns:
      An array of the shape of the product, in its dtype.

    Raises:
      TypeError: ``x`` or ``gate`` is not floating; as :func:`activation_scales`.
      ValueError: as :func:`activation_scales` and :func:`constrained`.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.glu(1.0, 2.0, jax.nn.gelu):.3f}")  # GEGLU
      2.998

    References:
      *u-µP* (arXiv:2407.17465), whose one factor for all three of SwiGLU is up to 4 % from these;
      the units: Shazeer, *GLU variants improve Transformer*, 2020 (arXiv:2002.05202).
    """
    m, scales = static(mult, "mult"), activation_scales(f, mult)
    s, left, right = constrained(constraint, scales.gate, scales.gate, scales.grad)
    unit = scaled(lambda a, g: a * f(scale_fwd(g, m)), s / m, left / m, right)
    return unit(floating(x, "glu's x"), floating(gate, "glu's gate"))


def silu_glu(
    x: ArrayLike,
    gate: ArrayLike,
    *,
    mult: float = 1.0,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns SwiGLU at scale one: :func:`glu` of ``jax.nn.silu``.

    .. math:: y = s\, x\, g\,\sigma(m g), \qquad s = b_x = 1.677, \; b_g = 1.623 \quad (m = 1)

    Args:
      x: a floating array.
      gate: g, of a shape that fits ``x``.
      mult: m, a positive finite Python number.
      constraint: of s, b_x and b_g, as for :func:`constrained`.

    Returns:
      An array of the shape of the product, in its dtype.

    Raises:
      TypeError or ValueError: as :func:`glu`.

    Example:
      >>> from uscale_jax import numerics as un
      >>> print(f"{un.silu_glu(1.0, 2.0):.3f}")
      2.953

    References:
      *u-µP* (arXiv:2407.17465), whose one factor for all three is 1.682.
    """
    return glu(x, gate, jax.nn.silu, mult=mult, constraint=constraint)


_GELU = {flag: partial(jax.nn.gelu, approximate=flag) for flag in (True, False)}
