"""fp8_dot_general: matrix products of float8 operands, forward and backward, with static scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike

from uscale_jax import _factors, _jax
from uscale_jax.numerics import _formats
from uscale_jax.numerics._formats import Format, FormatLike
from uscale_jax.numerics._scale import floating


@dataclass(frozen=True)
class Fp8DotGeneral:
    """What :func:`fp8_dot_general` returns: a ``jax.lax.dot_general`` with settings.

    Two of equal settings are equal, so that models that hold them are compiled once.
    """

    forward: Format
    backward: Format
    lhs_scale: float
    rhs_scale: float
    grad_scale: float
    out_multiplier: float
    lhs_grad_multiplier: float
    rhs_grad_multiplier: float
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
        lhs, rhs = _operand(lhs, "lhs"), _operand(rhs, "rhs")
        wanted = self.dtype if preferred_element_type is None else preferred_element_type
        settings = {"preferred_element_type": wanted, "out_sharding": out_sharding}
        plain = partial(lax.dot_general, dimension_numbers=dimension_numbers, **settings)
        dtypes = lhs.dtype, rhs.dtype, _result(jax.eval_shape(plain, lhs, rhs).dtype)
        how = _Product(self, _as_tuples(dimension_numbers), precision, dtypes, out_sharding)
        return _product(how, *_equally_varying(lhs, rhs))


def fp8_dot_general(
    forward: FormatLike = "float8_e4m3fn",
    backward: FormatLike = "float8_e5m2",
    *,
    lhs_scale: float = 1.0,
    rhs_scale: float = 1.0,
    grad_scale: float = 1.0,
    out_multiplier: float = 1.0,
    lhs_grad_multiplier: float = 1.0,
    rhs_grad_multiplier: float = 1.0,
    dtype: Any = None,
) -> Fp8DotGeneral:
    r"""Returns a ``jax.lax.dot_general`` whose three products are products of float8 operands.

    .. math::

       x_8 = Q_f(s_x x), \quad w_8 = Q_f(s_w w), \quad g_8 = Q_b(s_g\, \partial L / \partial y)

       y = \frac{m_y}{s_x s_w}\; x_8 \cdot w_8, \qquad
       \frac{\partial L}{\partial x} = \frac{m_x}{s_g s_w}\; g_8 \cdot w_8^T, \qquad
       \frac{\partial L}{\partial w} = \frac{m_w}{s_g s_x}\; x_8^T \cdot g_8

    with x and w the operands (lhs and rhs), s scales, m multipliers and Q the cast that saturates,
    :func:`saturating_cast`.  Sums are float32.  A fraction is one number, known before compilation,
    by which sums are multiplied: on GPUs a part of the product, one of cuBLASLt's scales.  No pass
    over operands finds their largest values: scales are given, and are 1 where tensors have unit
    scale.  x_8 and w_8 are kept for the backward pass, a byte an element.

    **Scales** change no result but for rounding and saturation: choose them so that s times what
    is scaled has a standard deviation near 1 (``float8_e4m3fn`` rounds well from about 2^-5 to
    2^6).  Powers of two add no rounding.  Where a fraction is one too, a result in bfloat16 leaves
    the product as such; else it leaves as float32, to be rounded by what follows.

    **Multipliers** are the factors of a unit-scaled product, fan_in^-½ and the like.  They are
    three numbers of their own: gradients are those of y where all three are equal.

    Gradients have the operands' dtypes; second derivatives and forward mode raise TypeError.
    Where there are no float8 units (CPU), products are of the same rounded operands.

    Args:
      forward: the format of both operands, of 8 bits; a name or a dtype.
      backward: that of cotangents.  cuBLASLt multiplies e4m3 by e4m3 and by e5m2, not e5m2 by e5m2.
      lhs_scale: s_x, positive: a number, not a traced value.
      rhs_scale: s_w.
      grad_scale: s_g.
      out_multiplier: m_y, positive.
      lhs_grad_multiplier: m_x.
      rhs_grad_multiplier: m_w.
      dtype: the result's where a call names no ``preferred_element_type``; None: the operands'.

    Returns:
      A function with the arguments of ``jax.lax.dot_general``, for ``dot_general=`` of
      ``nnx.Linear``, ``nnx.LinearGeneral``, ``linen.Dense`` and ``linen.DenseGeneral``, and
      ``qkv_dot_general=`` and ``out_dot_general=`` of ``nnx.MultiHeadAttention``.  It raises
      TypeError for operands that are not floating, or float8 already.  ``precision`` is that of
      the forward product; backward ones have ``Precision.HIGHEST``, with which NVIDIA's float8
      units add in all bits of float32.

    Raises:
      ValueError: a format is unknown or not one of 8 bits; a scale or a multiplier is not positive
        and finite; or a fraction is beyond float32.
      TypeError: a scale or multiplier is traced, or no number; ``dtype`` is not floating.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import uscale_jax as us
      >>> dot = us.fp8_dot_general(rhs_scale=16.0)  # weights of about 1/16
      >>> layer = nnx.Linear(256, 64, dot_general=dot, rngs=nnx.Rngs(0))
      >>> x = jax.random.normal(jax.random.key(1), (32, 256))
      >>> exact = x @ layer.kernel + layer.bias
      >>> error = jnp.std(layer(x) - exact) / jnp.std(exact)
      >>> print(f"{error:.2f}")
      0.04

    References:
      The formats: Micikevicius et al., *FP8 formats for deep learning*, 2022 (arXiv:2209.05433).
      Static scales: Blake et al., *Unit scaling*, 2023 (arXiv:2303.11257), and *µnit scaling*,
      2025 (arXiv:2502.05967).  ``flax.linen.Fp8DirectDotGeneralOp`` keeps histories of largest
      values and scales by them instead.
    """
    numbers = {
        "lhs_scale": lhs_scale,
        "rhs_scale": rhs_scale,
        "grad_scale": grad_scale,
        "out_multiplier": out_multiplier,
        "lhs_grad_multiplier": lhs_grad_multiplier,
        "rhs_grad_multiplier": rhs_grad_multiplier,
    }
    static = {name: _static(value, name) for name, value in numbers.items()}
    ahead, behind = _eight_bits(forward, "forward"), _eight_bits(backward, "backward")
    wanted = None if dtype is None else _result(np.dtype(dtype))
    dot = Fp8DotGeneral(ahead, behind, **static, dtype=wanted)
    for of in ("out", "lhs_grad", "rhs_grad"):
        _factors.check_factor(_fraction(dot, of), f"{of}_multiplier over the product of its scales")
    return dot


@dataclass(frozen=True)
class _Product:
    """All that is static of one product."""

    dot: Fp8DotGeneral
    numbers: Any
    precision: Any
    dtypes: tuple[Any, Any, Any]
    """Of the operands and the result."""
    out_sharding: Any


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _product(how: _Product, lhs: jax.Array, rhs: jax.Array) -> jax.Array:
    return _forward(how, lhs, rhs)[0]


def _forward(
    how: _Product, lhs: jax.Array, rhs: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    dot = how.dot
    lhs8 = _formats.scaled_cast(_opaque(lhs), dot.forward, dot.lhs_scale)
    rhs8 = _formats.scaled_cast(_opaque(rhs), dot.forward, dot.rhs_scale)
    settings = {"precision": how.precision, "out_sharding": how.out_sharding}
    factor, dtype = _fraction(dot, "out"), how.dtypes[2]
    return _multiplied(lhs8, rhs8, how.numbers, factor, dtype, **settings), (lhs8, rhs8)


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def _backward(
    how: _Product, kept: tuple[jax.Array, jax.Array], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    dot, (lhs8, rhs8) = how.dot, kept
    g8 = _formats.scaled_cast(g, dot.backward, dot.grad_scale)
    factors = _fraction(dot, "lhs_grad"), _fraction(dot, "rhs_grad")
    turned = tuple(pair[::-1] for pair in how.numbers)
    lhs_grad = _transposed(g8, lhs8, rhs8, how.numbers, factors[0], how.dtypes[0], first=True)
    rhs_grad = _transposed(g8, rhs8, lhs8, turned, factors[1], how.dtypes[1], first=False)
    return lhs_grad, rhs_grad


@_backward.defjvp
def _no_second_derivative(how: _Product, primals: Any, tangents: Any) -> Any:
    raise TypeError(
        "gradients of fp8_dot_general have no derivative: it would be one of casts to float8. "
        "Fix: take second derivatives of the model with jax.lax.dot_general."
    )


_product.defvjp(_forward, _backward)


def _transposed(
    g8: jax.Array,
    own: jax.Array,
    other: jax.Array,
    numbers: Any,
    factor: float,
    dtype: Any,
    *,
    first: bool,
) -> jax.Array:
    """The gradient of operand ``own``: g·other, summed over the free dimensions of ``other``.

    g has the batch dimensions, then the free ones of the first operand, then of the second.
    """
    (own_summed, other_summed), (own_batch, other_batch) = numbers
    own_free = _others(own.ndim, *own_summed, *own_batch)
    other_free = _others(other.ndim, *other_summed, *other_batch)
    n = len(own_batch)
    start = n + len(own_free) if first else n
    from_g = (*range(start, start + len(other_free)),), (*range(n),)
    # What is left of ``other`` comes in its own order.
    own_by_other = [own for _, own in sorted(zip(other_summed, own_summed, strict=True))]
    # In these orders, gradients of ``x @ w`` need no transposition: XLA would not find the factor
    # behind one, and would multiply in a pass of its own.
    if first:
        operands, sides = (g8, other), (from_g, (other_free, other_batch))
        order = (*own_batch, *own_free, *own_by_other)
    else:
        operands, sides = (other, g8), ((other_free, other_batch), from_g)
        order = (*own_batch, *own_by_other, *own_free)
    settings = {"precision": lax.Precision.HIGHEST, "out_sharding": _sharding(own, order)}
    found = _multiplied(*operands, tuple(zip(*sides, strict=True)), factor, dtype, **settings)
    return jnp.transpose(found, [order.index(i) for i in range(own.ndim)])


def _multiplied(
    lhs8: jax.Array, rhs8: jax.Array, numbers: Any, factor: float, dtype: Any, **settings: Any
) -> jax.Array:
    """factor·lhs·rhs, rounded to ``dtype`` once."""
    # A product in bfloat16, times a power of two, is that of the sums times it.  A product in
    # float32 would be written to memory and read again to be rounded.  float16 might overflow.
    exact = dtype == jnp.bfloat16 and math.frexp(factor)[0] == 0.5
    wide = jnp.dtype(jnp.bfloat16 if exact else jnp.float32)
    out = lax.dot_general(lhs8, rhs8, numbers, preferred_element_type=wide, **settings)
    if factor != 1:
        # XLA shares one constant among all products of a shape, and then folds it into none of
        # them.  Behind a barrier with the operands, no two products' being the same, it is one of
        # its own, which becomes a scale of the product.  Operands are not taken from there, for a
        # transposition could not be fused into them.
        scale, *_ = lax.optimization_barrier((jnp.asarray(factor, jnp.float32), lhs8, rhs8))
        out = out * scale.astype(wide)
    return out.astype(dtype)


def _fraction(dot: Fp8DotGeneral, of: str) -> float:
    """The one number a product is multiplied by."""
    scales = {
        "out": dot.lhs_scale * dot.rhs_scale,
        "lhs_grad": dot.grad_scale * dot.rhs_scale,
        "rhs_grad": dot.grad_scale * dot.lhs_scale,
    }
    return getattr(dot, f"{of}_multiplier") / scales[of]


def _opaque(x: jax.Array) -> jax.Array:
    """An operand in the dtype of its cast, as one operation that XLA makes once for all readers."""
    wide = x.astype(_factors.compute_dtype(x.dtype))
    return wide * lax.optimization_barrier(jnp.ones((), wide.dtype))


def _others(ndim: int, *dims: int) -> tuple[int, ...]:
    return tuple(i for i in range(ndim) if i not in dims)


def _as_tuples(numbers: Any) -> Any:
    return tuple(tuple(tuple(map(int, dims)) for dims in pair) for pair in numbers)


def _sharding(x: jax.Array, order: Sequence[int]) -> Any:
    """The sharding of ``x`` with its dimensions in this order, where shardings are in types."""
    own = jax.typeof(x).sharding
    if own.mesh.empty or not _jax.is_explicit(own.mesh):
        return None
    return jax.NamedSharding(own.mesh, jax.P(*(own.spec[i] for i in order)))


def _equally_varying(lhs: jax.Array, rhs: jax.Array) -> list[jax.Array]:
    """Operands that vary over the same axes of a mesh, in ``jax.shard_map``.

    JAX makes the operands of its own products so, and thereby sums gradients over those axes.
    """
    axes = sorted(_jax.varying(lhs) | _jax.varying(rhs))
    return [_jax.spread(x, axes) for x in (lhs, rhs)]


def _operand(x: Any, what: str) -> jax.Array:
    array = floating(x, f"fp8_dot_general's {what}")
    if jnp.finfo(array.dtype).bits < 16:
        raise TypeError(
            f"fp8_dot_general's {what} is {array.dtype.name} already. Expected: bfloat16, float16, "
            "float32 or float64, to be scaled and rounded here. Fix: pass what it was rounded "
            "from, or multiply with jax.lax.dot_general(..., preferred_element_type=jnp.float32)."
        )
    return array


def _result(dtype: Any) -> Any:
    """A dtype that results may have."""
    if jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits >= 16:
        return dtype
    raise TypeError(
        f"the result of fp8_dot_general cannot be {np.dtype(dtype).name}. Expected: bfloat16, "
        "float16, float32 or float64. Fix: leave dtype and preferred_element_type out, and round "
        "the result with saturating_cast."
    )


def _eight_bits(fmt: FormatLike, what: str) -> Format:
    found = _formats.number_format(fmt)
    if found.bits == 8:
        return found
    eight = ", ".join(name for name, each in _formats.FORMATS.items() if each.bits == 8)
    raise ValueError(
        f"{what} is {found.name}, of {found.bits} bits. Expected: one of {eight}. Fix: "
        "simulate_format takes other formats."
    )


def _static(value: Any, what: str) -> float:
    checked = _factors.check_factor(value, what)
    if _jax.is_traced(checked):
        raise TypeError(
            f"{what} is traced, {checked}. Expected: a number known before compilation. Fix: make "
            "the product outside of jit with a Python float, or multiply operands and result by "
            "the traced value yourself."
        )
    return float(checked)
