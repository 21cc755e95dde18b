"""Softmax and attention at scale one."""

from __future__ import annotations

import math
import operator
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from uscale_jax._factors import compute_dtype
from uscale_jax._tree import describe
from uscale_jax.numerics import _quadrature
from uscale_jax.numerics._constraints import Constraint, constrained
from uscale_jax.numerics._layers import dropout
from uscale_jax.numerics._scale import floating, scale_bwd, scale_fwd, scaled, static


def softmax(
    x: ArrayLike,
    axis: int = -1,
    *,
    mult: float = 1.0,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns softmax at scale one: probabilities times a constant.

    .. math:: y = s\, p, \quad p = \operatorname{softmax}(m x), \qquad
              \bar x_i = b\,m\, p_i \big(\bar y_i - {\textstyle\sum_j} p_j \bar y_j\big)

    with s = 1 / RMS p and b the same for gradients, over n normal x: one-dimensional integrals,
    exact for every n and m, by quadrature.  Of flat predictions s = n, of hard ones √n;
    Graphcore's library blends the two, and is at RMS 1.04 for n = 64, 0.82 for n = 1024.  (The
    mean is part of the scale here, because about it flat predictions have none.)

    Args:
      x: a floating array.
      axis: the dimension of the n classes, by which s varies.
      mult: m, a positive finite Python number.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      An array of the shape and dtype of ``x``, whose sums are s.

    Raises:
      TypeError: ``x`` is not floating, ``mult`` is traced.
      ValueError: ``mult`` is not positive and finite, ``axis`` no dimension of ``x``, no such
        constraint.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> y = un.softmax(jax.random.normal(jax.random.key(0), (1000, 64)))
      >>> print(f"{jnp.sqrt(jnp.mean(y**2)):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.2, for m = 1 and many classes,
      by the standard deviation; *u-µP*, 2024 (arXiv:2407.17465), for other m.
    """
    logits, m = floating(x, "softmax's x"), static(mult, "mult")
    if not -logits.ndim <= axis < logits.ndim:
        raise ValueError(
            f"axis={axis} is no dimension of softmax's x of shape {logits.shape}. Fix: pass the "
            "dimension of classes, -1 for the last."
        )
    n = max(logits.shape[axis], 1)
    moments = _quadrature.softmax_moments(n, m)
    s, b = constrained(constraint, n / _root(moments.square), n / (m * _root(moments.spread)))
    return scaled(lambda z: jax.nn.softmax(scale_fwd(z, m), axis), s, m * b)(logits)


def attention(
    query: ArrayLike,
    key: ArrayLike,
    value: ArrayLike,
    bias: ArrayLike | None = None,
    mask: ArrayLike | None = None,
    *,
    is_causal: bool = False,
    mult: float = 1.0,
    scale: float | None = None,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    deterministic: bool = False,
    broadcast_dropout: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns dot-product attention at scale one.

    .. math:: Y = s\, P V, \qquad P = \operatorname{softmax}\big({\textstyle\frac m d} Q K^\top\big)

    Logits are divided by d, not by its root: µP's rule, by which they stay of one size as queries
    and keys learn to point along each other.  At first they have standard deviation σ = m/√d, and
    with c the number of keys over that of queries and heads that share them,

    .. math::

       s &= \langle \Sigma p^2 \rangle^{-1/2}, &
       b_V &= (\langle \Sigma p^2 \rangle / c)^{-1/2}, \\
       b_Q &= \frac d m \big( d_V\, \langle \Sigma p^2 (1 - 2p + \Sigma p^2) \rangle \big)^{-1/2}, &
       b_K &= b_Q\, c^{1/2}

    are the factors of the output and the gradients, with means over queries (causal ones see 1 to
    all keys) of normal logits, by quadrature; dropout, if any, is :func:`dropout`.  Queries,
    keys and values mostly come from one tensor, so they share s by default: gradients of queries
    and keys are then small, about 0.12 at m = 1, 0.8 at m = √d.  A mask is taken to leave most
    keys, a bias to be small: their factors are not known while tracing.

    So s depends on the number of keys.  Where a model runs at other lengths than it was trained
    at, as in decoding with a cache, it needs that of training: ``scale``.

    It goes where Flax takes an ``attention_fn=``, whose shapes and options these are.

    Args:
      query: Q, of shape (..., queries, heads, d).
      key: K, of shape (..., keys, key heads, d); key heads divide heads (grouped queries).
      value: V, of shape (..., keys, key heads, d_V).
      bias: added to logits; broadcasts to (..., heads, queries, keys).
      mask: booleans, false for keys not to see; broadcasts likewise.
      is_causal: whether query i sees keys 0 to i only.
      mult: m, a positive finite Python number.
      scale: s, in place of the one for these shapes: :func:`attention_scale` of those of training.
      dropout_rate: of dropout on P, from 0 to below 1.
      dropout_rng: the random key of dropout; needed if there is any.
      deterministic: whether to take the mean over what dropout would do.
      broadcast_dropout: whether all examples and heads drop the same.
      dtype: what to cast Q, K and V to before all else.
      precision: of the two products, as in ``jnp.einsum``.
      module: for Flax; must be None, because attention weights are not recorded.
      constraint: of s, b_Q, b_K and b_V, as for :func:`constrained`.

    Returns:
      Y, of shape (..., queries, heads, d_V), in the dtype of ``value``.  Softmax is computed in
      float32, or float64 if the operands are so.

    Raises:
      TypeError: an operand is not floating, ``mult`` or ``dropout_rate`` is traced, ``mask`` not
        of booleans.
      ValueError: shapes do not fit, ``dropout_rate`` is out of its range or has no key, ``module``
        is given, no such constraint.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 128, 4, 16))
      >>> print(f"{jnp.std(un.attention(q, k, v, is_causal=True)):.1f}")
      1.0

    References:
      *u-µP*, 2024 (arXiv:2407.17465): m/d, and one factor for all, by a blend of limits; attention
      without it: Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257).
    """
    if module is not None:
        raise ValueError("attention records no weights. Fix: call Flax with sow_weights=False.")
    operands = {"query": query, "key": key, "value": value}
    q, k, v = (floating(x, f"attention's {name}") for name, x in operands.items())
    _check_shapes(q.shape, k.shape, v.shape)
    if dtype is not None:
        q, k, v = (x.astype(dtype) for x in (q, k, v))
    m = static(mult, "mult")
    output, *grads = _factors(q.shape, k.shape, v.shape, m, is_causal)
    output = output if scale is None else static(scale, "scale")
    s, *grads = constrained(constraint, output, *grads)
    q, k, v = (scale_bwd(x, b) for x, b in zip((q, k, v), grads, strict=True))
    logits = _logits(q, k, m, bias, precision)
    weights = jax.nn.softmax(_masked(logits, mask, is_causal), axis=-1).astype(v.dtype)
    weights = dropout(
        weights,
        dropout_rate,
        dropout_rng,
        deterministic=deterministic,
        broadcast_dims=range(weights.ndim - 2) if broadcast_dropout else (),
    )
    out = jnp.einsum("...kgts,...skd->...tkgd", weights, v, precision=precision)
    return scale_fwd(out.reshape(*q.shape[:-1], v.shape[-1]), s)


def attention_scale(length: int, d: int, *, is_causal: bool = False, mult: float = 1.0) -> float:
    r"""Returns the factor of the output of :func:`attention` for as many queries as keys.

    .. math:: s = \langle \Sigma p^2 \rangle^{-1/2}

    Args:
      length: the number of positions.
      d: the size of a head's queries and keys.
      is_causal: whether query i sees keys 0 to i only.
      mult: m, a positive finite Python number.

    Returns:
      s, what ``scale`` of :func:`attention` must be at every other length.

    Raises:
      TypeError: ``length`` or ``d`` is no integer, ``mult`` is traced.
      ValueError: one of them is not positive.

    Example:
      >>> import jax
      >>> from uscale_jax import numerics as un
      >>> s = un.attention_scale(1024, 64, is_causal=True)
      >>> print(f"{s:.2f}")
      11.61
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 5, 2, 64))
      >>> prompt = un.attention(q, k, v, is_causal=True, scale=s)

    References:
      As :func:`attention`.
    """
    sizes = {"length": operator.index(length), "d": operator.index(d)}
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"attention_scale's {name} must be positive, got {size}.")
    shape = (length, 1, d)
    return _factors(shape, shape, shape, static(mult, "mult"), is_causal)[0]


def _root(moment: float) -> float:
    # Over one class nothing varies, and gradients are 0 whatever their factor.
    return math.sqrt(moment) if moment > 1e-9 else 1.0


def _check_shapes(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> None:
    fits = (
        len(q) == len(k) == len(v) >= 3
        and q[:-3] == k[:-3] == v[:-3]
        and k[-3:-1] == v[-3:-1]
        and q[-1] == k[-1]
        and q[-2] % max(k[-2], 1) == 0
    )
    if not fits:
        raise ValueError(
            f"attention got query of shape {q}, key {k}, value {v}. Expected: (..., queries, "
            "heads, d), (..., keys, key heads, d) and (..., keys, key heads, d_V), key heads "
            "dividing heads. Fix: split heads off the last dimension; heads before positions need "
            "a jnp.swapaxes(x, -2, -3)."
        )


def _factors(
    q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], mult: float, causal: bool
) -> tuple[float, ...]:
    """The factors of the output and of the gradients of q, k and v."""
    (queries, heads, d), (keys, key_heads, _) = q[-3:], k[-3:]
    moments = _quadrature.attention_moments(queries, keys, mult / math.sqrt(d), causal)
    square, spread = (math.sqrt(keys) / _root(moment) for moment in moments)
    shared = math.sqrt(keys * key_heads / (queries * heads))
    grad = d / mult / math.sqrt(v[-1]) * spread
    return square, grad, grad * shared, square * shared


def _logits(
    q: jax.Array, k: jax.Array, mult: float, bias: ArrayLike | None, precision: Any
) -> jax.Array:
    """Of shape (..., key heads, heads for each, queries, keys), at least in float32."""
    *batch, queries, heads, d = q.shape
    grouped = q.reshape(*batch, queries, k.shape[-2], heads // k.shape[-2], d)
    logits = jnp.einsum(
        "...tkgd,...skd->...kgts",
        grouped,
        k,
        precision=precision,
        preferred_element_type=compute_dtype(q.dtype),
    )
    logits = logits * (mult / d)
    if bias is None:
        return logits
    return logits + _grouped(floating(bias, "attention's bias"), logits).astype(logits.dtype)


def _masked(logits: jax.Array, mask: ArrayLike | None, causal: bool) -> jax.Array:
    keep = []
    if mask is not None:
        if not jnp.issubdtype(jnp.result_type(mask), jnp.bool_):
            raise TypeError(
                f"attention's mask must be of booleans, got {describe(mask)}. Fix: pass "
                "mask=m > 0; what is to be added to logits is a bias."
            )
        keep.append(_grouped(jnp.asarray(mask), logits))
    if causal:
        keep.append(_grouped(jnp.tri(logits.shape[-2], logits.shape[-1], dtype=bool), logits))
    # Not −inf: a query that sees nothing would give NaN.
    lowest = -0.7 * float(jnp.finfo(logits.dtype).max)
    for seen in keep:
        logits = jnp.where(seen, logits, jnp.asarray(lowest, logits.dtype))
    return logits


def _grouped(x: jax.Array, logits: jax.Array) -> jax.Array:
    """What broadcasts to (..., heads, queries, keys), in the dimensions of logits."""
    groups = logits.shape[-4:-2]
    shape = (1,) * (logits.ndim - 1 - x.ndim) + x.shape
    heads = shape[-3] if len(shape) == logits.ndim - 1 else 0
    if heads not in (1, math.prod(groups)):
        raise ValueError(
            f"attention got a mask or bias of shape {x.shape}. Expected: what broadcasts to "
            f"{(*logits.shape[:-4], math.prod(groups), *logits.shape[-2:])}, (..., heads, queries, "
            "keys). Fix: reshape it."
        )
    return x.reshape(*shape[:-3], *(groups if heads > 1 else (1, 1)), *shape[-2:])
