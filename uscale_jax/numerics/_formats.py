"""Floating-point formats narrower than float32: their limits, and rounding to them once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from jax.typing import ArrayLike

from uscale_jax import _factors
from uscale_jax.numerics._scale import floating


@dataclass(frozen=True)
class Format:
    """What numbers a floating-point format holds; :func:`number_format` looks one up.

    Example:
      >>> from uscale_jax.numerics import number_format
      >>> e4m3 = number_format("float8_e4m3fn")
      >>> e4m3.max, e4m3.smallest_normal, e4m3.smallest_subnormal, e4m3.eps
      (448.0, 0.015625, 0.001953125, 0.125)
    """

    name: str
    """Such as ``'float8_e4m3fn'``: exponent and mantissa bits; "fn" for finite numbers and NaN
    only, "uz" for no negative zero, "b11" for an exponent bias of 11."""
    dtype: np.dtype[Any]
    bits: int
    max: float
    """The largest finite number."""
    smallest_normal: float
    """The smallest number of full precision."""
    smallest_subnormal: float
    """The smallest positive number; half of it and less rounds to 0."""
    eps: float
    """From 1 to the next number.  A normal number is rounded by at most eps/2 of itself."""
    has_inf: bool
    has_nan: bool

    def __repr__(self) -> str:
        """Return the name and the limits."""
        return (
            f"Format({self.name}: max {self.max:.6g}, normal from {self.smallest_normal:.3g}, "
            f"subnormal from {self.smallest_subnormal:.3g}, eps {self.eps:.3g})"
        )


FormatLike: TypeAlias = str | Format | Any
"""A format, its name, or its dtype as NumPy or JAX gives it."""

_NAMES = (
    "float4_e2m1fn",
    "float6_e2m3fn",
    "float6_e3m2fn",
    "float8_e3m4",
    "float8_e4m3",
    "float8_e4m3b11fnuz",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float16",
    "bfloat16",
    "float32",
)


def _described(name: str) -> Format:
    dtype = np.dtype(getattr(ml_dtypes, name, None) or name)
    info = ml_dtypes.finfo(dtype)
    with np.errstate(all="ignore"):
        inf, nan = (np.asarray(x, np.float32).astype(dtype).astype(np.float32) for x in _SPECIAL)
    return Format(
        name=name,
        dtype=dtype,
        bits=int(info.bits),
        max=float(info.max),
        smallest_normal=float(info.smallest_normal),
        smallest_subnormal=float(info.smallest_subnormal),
        eps=float(info.eps),
        has_inf=bool(np.isinf(inf)),
        has_nan=bool(np.isnan(nan)),
    )


_SPECIAL = (np.inf, np.nan)
_BUILTIN = ("float16", "float32")

FORMATS: Mapping[str, Format] = MappingProxyType(
    {name: _described(name) for name in _NAMES if name in _BUILTIN or hasattr(ml_dtypes, name)}
)
"""Every format by name, the narrowest first."""


def number_format(fmt: FormatLike) -> Format:
    """Returns the limits of a floating-point format.

    Args:
      fmt: a name (``"float8_e4m3fn"``), a dtype (``jnp.float8_e4m3fn``) or a :class:`Format`.

    Returns:
      The :class:`Format`.

    Raises:
      ValueError: it is none of the formats known.  ``float8_e8m0fnu`` is none: it has neither 0
        nor negative numbers, and is for the scales of blocks.

    Example:
      >>> from uscale_jax.numerics import number_format
      >>> number_format("float8_e5m2").max
      57344.0

    References:
      Micikevicius et al., *FP8 formats for deep learning*, 2022 (arXiv:2209.05433): E4M3, which
      gives up infinity for range, and E5M2.
    """
    if isinstance(fmt, Format):
        return fmt
    name = fmt if isinstance(fmt, str) else _dtype_name(fmt)
    if name in FORMATS:
        return FORMATS[name]
    why = " (powers of two only, no 0)" if name == "float8_e8m0fnu" else ""
    raise ValueError(
        f"{fmt!r} is no number format that is known{why}. Expected: one of {', '.join(FORMATS)}."
    )


def _dtype_name(dtype: Any) -> str:
    try:
        return np.dtype(dtype).name
    except TypeError:
        return ""


def both_ways(forward: FormatLike, backward: FormatLike | None) -> tuple[Format, Format]:
    """Returns the formats of values and of gradients, which need more range at 8 bits."""
    fmt = number_format(forward)
    if backward is None:
        backward = "float8_e5m2" if fmt.bits == 8 else fmt
    return fmt, number_format(backward)


def saturating_cast(x: ArrayLike, dtype: FormatLike) -> jax.Array:
    r"""Returns ``x`` in another format, what is too large as the largest number there is.

    .. math:: y = \mathrm{round}_{\text{dtype}}\bigl(\min(\max(x, -\max), \max)\bigr)

    Rounding is to the nearest number, of two to the even one, and once: a float64 is not rounded
    to float32 on the way, as XLA does.  ``astype`` does not saturate: from 464 up it makes NaN of
    floats in ``float8_e4m3fn``, and infinity in formats that have it.

    What is not finite stays visible: NaN is NaN, ±inf is ±inf where the format has it and NaN
    elsewhere.  ``float4_e2m1fn`` has neither; there both become the largest number.

    Derivatives are those JAX gives a cast, and so in the narrow format themselves:
    :func:`quantized` lets them pass unrounded.

    Args:
      x: floating, of any shape.
      dtype: a name (``"float8_e4m3fn"``), a dtype or a :class:`Format`.

    Returns:
      An array of the same shape in that dtype.

    Raises:
      TypeError: ``x`` is not floating.
      ValueError: the format is not known, or XLA does not convert to it (``float6``):
        :func:`quantized` rounds to it.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax.numerics import saturating_cast
      >>> x = jnp.array([1.1, 465.0, -jnp.inf])
      >>> saturating_cast(x, "float8_e4m3fn").astype(jnp.float32)
      Array([  1.125, 448.   ,     nan], dtype=float32)
      >>> x.astype(jnp.float8_e4m3fn).astype(jnp.float32)
      Array([1.125,   nan,   nan], dtype=float32)

    References:
      Micikevicius et al., *FP8 formats for deep learning*, 2022 (arXiv:2209.05433).
    """
    fmt = number_format(dtype)
    if fmt.bits == 6:
        raise ValueError(
            f"XLA does not convert to {fmt.name}. Expected: a format of 4, 8, 16 or 32 bits. Fix: "
            "quantized(x, dtype) gives its numbers in the dtype of x."
        )
    return scaled_cast(floating(x, "saturating_cast's x"), fmt, 1.0)


_ROUNDED_ONCE: tuple[str, ...] = ("float8_e4m3fn", "float8_e5m2", "float16", "bfloat16", "float32")
"""What XLA rounds float32 to once, on GPUs in one instruction.  To other formats CPUs go by way of
float16, and all devices go from float64 by way of float32: there, numbers are rounded before."""
if jax.__version_info__ < (0, 10):  # CPUs go by way of float16 to these too
    _ROUNDED_ONCE = ()


def scaled_cast(x: jax.Array, fmt: Format, scale: float) -> jax.Array:
    """Returns scale·x in a format, saturating; a product too large for float32 saturates too."""
    x = x.astype(_factors.compute_dtype(x.dtype))
    y = jnp.clip(x * scale if scale != 1 else x, -fmt.max, fmt.max)
    if x.dtype == jnp.float64 or fmt.name not in _ROUNDED_ONCE:
        y = _on_grid(y, fmt)
    if not fmt.has_nan:
        return jnp.where(jnp.isnan(y), fmt.max, y).astype(fmt.dtype)
    # 0 of what is finite, and −inf of inf, from which formats without infinity make NaN.  A select
    # would do the same; but XLA does not fuse it with the transposition that products need.
    largest = float(jnp.finfo(x.dtype).max)
    return (y - (jnp.clip(x, -largest, largest) - x)).astype(fmt.dtype)


def quantized(x: ArrayLike, dtype: FormatLike) -> jax.Array:
    r"""Returns ``x`` rounded to the numbers of a format, in its own dtype.

    As :func:`saturating_cast` there and back, for every format, those included that XLA does not
    convert to.  It is computed with arithmetic in the dtype of ``x`` (at least float32), which no
    compiler option may simplify away.  The largest number is one that the dtype of ``x`` has too.
    NaN is NaN; ±inf is ±inf where the format has it and NaN elsewhere.

    Derivatives pass straight through: :math:`\partial y / \partial x = 1` everywhere.

    Args:
      x: floating, of any shape.
      dtype: a name (``"float6_e3m2fn"``), a dtype or a :class:`Format`.

    Returns:
      An array of the same shape and dtype.

    Raises:
      TypeError: ``x`` is not floating.
      ValueError: the format is not known.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax.numerics import quantized
      >>> quantized(jnp.array([0.3, 1.1, 99.0]), "float6_e3m2fn")
      Array([ 0.3125,  1.    , 28.    ], dtype=float32)

    References:
      Straight through: Bengio, Léonard & Courville, *Estimating or propagating gradients through
      stochastic neurons for conditional computation*, 2013 (arXiv:1308.3432).
    """
    return _quantized(floating(x, "quantized's x"), number_format(dtype))


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _quantized(x: jax.Array, fmt: Format) -> jax.Array:
    if _holds_all(fmt, x.dtype):
        return x
    wide = _factors.compute_dtype(x.dtype)
    scaled, limit = x.astype(wide), _limit(fmt, x.dtype)
    y = _on_grid(jnp.clip(scaled, -limit, limit), fmt)
    return jnp.where(jnp.isinf(x), _infinity(scaled, fmt), y).astype(x.dtype)


@_quantized.defjvp
def _quantized_jvp(fmt: Format, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    return _quantized(primals[0], fmt), tangents[0]


def _infinity(x: jax.Array, fmt: Format) -> jax.Array:
    """What infinities in ``x`` become."""
    return x if fmt.has_inf else jnp.full_like(x, jnp.nan)


def _holds_all(fmt: Format, dtype: Any) -> bool:
    """Whether every number of a dtype is one of the format."""
    info = jnp.finfo(dtype)
    fine = float(info.eps) >= fmt.eps and float(info.smallest_subnormal) >= fmt.smallest_subnormal
    return fine and float(info.max) <= fmt.max


def _limit(fmt: Format, dtype: Any) -> float:
    """The largest number that both have: float16 has none of the 65536 of bfloat16, say."""
    info = jnp.finfo(dtype)
    digits = 1 - int(math.log2(max(fmt.eps, float(info.eps))))
    fraction, exponent = math.frexp(min(fmt.max, float(info.max)))
    return math.ldexp(math.floor(math.ldexp(fraction, digits)), exponent - digits)


def _on_grid(x: jax.Array, fmt: Format) -> jax.Array:
    """Returns ``x``, at most the format's largest number, rounded to its numbers.

    Steps between numbers are eps times the power of two below, at least the smallest subnormal.
    Everything but the rounding is exact: products with powers of two.
    """
    info, bits = jnp.finfo(x.dtype), _UNSIGNED[x.dtype.itemsize]
    if fmt.smallest_subnormal < float(info.smallest_normal):  # bfloat16: steps would be flushed
        mantissa = round(-math.log2(fmt.eps))
        return jax.lax.reduce_precision(x, fmt.bits - 1 - mantissa, mantissa)
    as_bits = partial(jax.lax.bitcast_convert_type, new_dtype=bits)
    as_float = partial(jax.lax.bitcast_convert_type, new_dtype=x.dtype)
    infinity = int(np.asarray(np.inf, x.dtype).view(bits))  # all bits of the exponent
    one = int(np.asarray(1, x.dtype).view(bits))
    power = as_float(as_bits(x) & jnp.asarray(infinity, bits))
    power = jnp.maximum(power, fmt.smallest_normal)
    inverse = as_float(jnp.asarray(2 * one, bits) - as_bits(power))
    steps = jax.lax.round(x * inverse * (1 / fmt.eps), jax.lax.RoundingMethod.TO_NEAREST_EVEN)
    return steps * (power * fmt.eps)


_UNSIGNED: Mapping[int, Any] = {4: jnp.uint32, 8: jnp.uint64}
