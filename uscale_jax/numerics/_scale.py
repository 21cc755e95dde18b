"""scale_fwd and scale_bwd: the two verbs of unit scaling, and all its custom derivatives.

Everything else in this package is a composition of the two around ordinary JAX operations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax import _factors, _tree
from uscale_jax._types import Factor

FORWARD, BACKWARD, OPERAND = "scale_fwd", "scale_bwd", "scale_operand"
"""Scopes of factors, by which programs tell them from what is multiplied; the last is around
factors of what an operation reads."""

# JAX's caches of traced and compiled programs are keyed by it, so that what was traced with one
# meaning of scale_bwd is never reused with the other, under jit, scan and remat too.
_TRUE_GRADIENTS = jax.make_user_context(False)


@contextmanager
def true_gradients() -> Iterator[None]:
    r"""Within it, gradients are those of the forward pass: no factor is of one direction only.

    .. math::

       \text{scale\_fwd}: \; \bar x = s\,\bar y \qquad \text{scale\_bwd}: \; \bar x = \bar y

    instead of :math:`\bar x = \bar y` and :math:`\bar x = s\,\bar y`.  Outputs are the same.  It
    decides while a function is traced, and is a part of the key of JAX's caches: functions under
    ``jax.jit`` are traced again within it, and again not after it.  Forward-mode differentiation
    works in it too.

    Returns:
      A context manager.

    Raises:
      Nothing of its own.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> cube = jax.jit(lambda x: un.scale_bwd(x, 10.0) ** 3)
      >>> print(jax.grad(cube)(2.0))
      120.0
      >>> with un.true_gradients():
      ...     print(jax.grad(cube)(2.0), jax.jvp(cube, (2.0,), (1.0,))[1])
      12.0 12.0

    References:
      What gradients of unit-scaled models must have in common with true ones: Blake et al.,
      *Unit Scaling*, 2023 (arXiv:2303.11257), Section 4 and Appendix E.
    """
    with _TRUE_GRADIENTS(True):
        yield


def gradients_are_true() -> bool:
    """Returns whether what is traced now is within :func:`true_gradients`."""
    return bool(_TRUE_GRADIENTS.value)


def scale_fwd(x: ArrayLike, s: Factor) -> jax.Array:
    r"""Returns s·x, whose gradient is passed on as it is.

    .. math:: y = s\,x, \qquad \bar x = \bar y

    Narrow dtypes are multiplied in float32 and rounded once; the dtype stays.

    Args:
      x: a floating array.
      s: a positive finite scalar; it may be traced (a factor by layer, under ``jax.lax.scan``).
        No gradient reaches it.

    Returns:
      An array of the shape and dtype of ``x``.

    Raises:
      TypeError: ``x`` is not floating, ``s`` no real number; from JAX, in forward mode
        (``jax.jvp``, ``jax.jacfwd``, ``jax.hessian``), which the two directions would contradict:
        see :func:`true_gradients`.
      ValueError: ``s`` is zero, negative, NaN, infinite or not a scalar.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> y, gradient = jax.value_and_grad(lambda x: un.scale_fwd(x, 4.0))(3.0)
      >>> print(y, gradient)
      12.0 1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Section 4.
    """
    array, factor = floating(x, "scale_fwd's x"), _factors.check_factor(s, "scale_fwd's s")
    if isinstance(factor, float) and factor == 1:
        return array
    if _TRUE_GRADIENTS.value:
        return _factors.multiply(array, jax.lax.stop_gradient(factor))
    with jax.named_scope(FORWARD):
        return _forward_only(array, factor)


def scale_bwd(x: ArrayLike, s: Factor) -> jax.Array:
    r"""Returns x, whose gradient is multiplied by s.

    .. math:: y = x, \qquad \bar x = s\,\bar y

    Narrow dtypes are multiplied in float32 and rounded once; the dtype stays.

    Args:
      x: a floating array.
      s: a positive finite scalar; it may be traced.  No gradient reaches it.

    Returns:
      ``x``.

    Raises:
      TypeError: ``x`` is not floating, ``s`` no real number; from JAX, in forward mode, as for
        :func:`scale_fwd`.
      ValueError: ``s`` is zero, negative, NaN, infinite or not a scalar.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> y, gradient = jax.value_and_grad(lambda x: un.scale_bwd(x, 4.0))(3.0)
      >>> print(y, gradient)
      3.0 4.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Section 4.
    """
    array, factor = floating(x, "scale_bwd's x"), _factors.check_factor(s, "scale_bwd's s")
    if _TRUE_GRADIENTS.value or (isinstance(factor, float) and factor == 1):
        return array
    with jax.named_scope(BACKWARD):
        return _backward_only(array, factor)


def scaled(f: Callable[..., Any], output: Factor, *grads: Factor) -> Callable[..., jax.Array]:
    r"""Returns f with a factor on its output, and one on the gradient of each operand.

    .. math:: y = s\,f(x_1, x_2, \ldots), \qquad
              \bar x_i = b_i \left(\frac{\partial f}{\partial x_i}\right)^{\!\top} \bar y

    Args:
      f: a function of arrays to one array.
      output: s, a positive finite scalar.
      *grads: b of the first operands; those after them, and keyword arguments, are passed on.
        :func:`constrained` makes s and b agree where they must.

    Returns:
      The function, of the same arguments.

    Raises:
      TypeError: as :func:`scale_fwd`, when the function is called.
      ValueError: as :func:`scale_fwd`, at once; later, if there are fewer operands than ``grads``.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> cube = un.scaled(lambda x: x**3, 15**-0.5, 27**-0.5)  # moments of a normal number
      >>> x, g = jax.random.normal(jax.random.key(0), (2, 10_000))
      >>> y, pull = jax.vjp(cube, x)
      >>> print(f"{jnp.std(y):.1f} {jnp.std(pull(g)[0]):.1f}")
      1.0 1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Section 4.
    """
    forward = _factors.check_factor(output, "scaled's output")
    backward = [_factors.check_factor(b, f"scaled's grads[{i}]") for i, b in enumerate(grads)]

    @wraps(f)
    def unit(*args: Any, **kwargs: Any) -> jax.Array:
        if len(args) < len(backward):
            raise ValueError(
                f"scaled was given {len(backward)} factors for gradients, the function "
                f"{len(args)} operands. Fix: pass operands by position, one a factor."
            )
        operands = [scale_bwd(x, b) for x, b in zip(args, backward, strict=False)]
        return scale_fwd(f(*operands, *args[len(backward) :], **kwargs), forward)

    return unit


def floating(x: Any, what: str) -> jax.Array:
    """Returns ``x`` as an array; refuses what is not floating."""
    array = jnp.asarray(x)
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise TypeError(
            f"{what} must be floating, got {_tree.describe(x)}. Expected: a real floating dtype, "
            "float8 to float64. Fix: cast it, x.astype(jnp.float32)."
        )
    return array


def static(number: float, what: str) -> float:
    """Returns a factor that others are computed from; refuses traced ones."""
    factor = _factors.check_factor(number, what)
    if not isinstance(factor, float):
        raise TypeError(
            f"{what} must be known while tracing, because factors are computed from it; got a "
            "traced value. Fix: pass a Python number (static_argnums of jax.jit)."
        )
    return factor


@jax.custom_vjp
def _forward_only(x: jax.Array, s: Factor) -> jax.Array:
    return _factors.multiply(x, s)


@jax.custom_vjp
def _backward_only(x: jax.Array, s: Factor) -> jax.Array:
    del s
    return x


# None is a cotangent of zeros: factors are constants.
_forward_only.defvjp(lambda x, s: (_factors.multiply(x, s), None), lambda _, g: (g, None))
_backward_only.defvjp(lambda x, s: (x, s), lambda s, g: (_factors.multiply(g, s), None))
