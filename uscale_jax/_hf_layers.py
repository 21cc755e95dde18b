"""PyTorch's layers as functions of JAX: products, attention, norms, convolutions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

# Products


def linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Returns rows of x times rows of the weight, as PyTorch keeps it: [out, in]."""
    product = lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ())))
    return product if bias is None else product + bias


def addmm(bias: Any, x: Any, y: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    """Returns β·bias + α·x·y."""
    return scaled(bias, beta) + scaled(x @ y, alpha)


def scaled(x: Any, factor: float) -> Any:
    """Returns x times a factor that mostly is 1."""
    return x if factor == 1 else x * factor


def attention(
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Returns what heads read of values; groups of heads may share keys and values."""
    *batch, heads, length, size = query.shape
    groups = key.shape[-3] if enable_gqa else heads
    shared = query.reshape(*batch, groups, heads // groups, length, size)
    scores = jnp.einsum("...gqtd,...gsd->...gqts", shared, key)
    scores = scores * (1 / math.sqrt(size) if scale is None else scale)
    if is_causal:
        attn_mask = np.tri(length, key.shape[-2], dtype=bool)
    if attn_mask is not None:
        scores = _masked(scores, attn_mask, (groups, heads // groups))
    weights = jax.nn.softmax(scores, axis=-1)
    mixed = jnp.einsum("...gqts,...gsd->...gqtd", weights, value)
    return mixed.reshape(*batch, heads, length, value.shape[-1])


def _masked(scores: Any, mask: Any, heads: tuple[int, int]) -> Any:
    """Scores where the mask is true, or plus a mask of numbers."""
    if mask.ndim > 2:  # it has a dimension of heads, of one place or all
        *batch, given, length, places = mask.shape
        split = (1, 1) if given == 1 else heads
        mask = mask.reshape(*batch, *split, length, places)
    if mask.dtype != bool:
        return scores + mask
    return jnp.where(mask, scores, jnp.finfo(scores.dtype).min)


# Norms


def layer_norm(
    x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """Returns x with mean 0 and variance 1 over its last dimensions, times weight, plus bias."""
    axes = _last(x, shape)
    centred = x - jnp.mean(x, axes, keepdims=True)
    normed = centred * lax.rsqrt(jnp.mean(jnp.square(centred), axes, keepdims=True) + eps)
    return _affine(normed, weight, bias)


def rms_norm(x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """Returns x with mean square 1 over its last dimensions, times weight."""
    floor = float(jnp.finfo(x.dtype).eps) if eps is None else eps
    square = jnp.mean(jnp.square(x), _last(x, shape), keepdims=True)
    return _affine(x * lax.rsqrt(square + floor), weight, None)


def _last(x: Any, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(range(x.ndim - len(shape), x.ndim))


def _placed(v: Any, x: Any) -> Any:
    """Numbers of channels, to meet those of x."""
    return v if v is None else v.reshape(-1, *[1] * (x.ndim - 2))


def _affine(x: Any, weight: Any, bias: Any) -> Any:
    x = x if weight is None else x * weight
    return x if bias is None else x + bias


def batch_norm(
    x: Any,
    weight: Any,
    bias: Any,
    mean: Any,
    var: Any,
    _train: bool,
    _: float,
    eps: float,
    *__: Any,
) -> Any:
    """Returns x normalised by means and variances of earlier batches."""
    normed = (x - _placed(mean, x)) * lax.rsqrt(_placed(var, x) + eps)
    return _affine(normed, _placed(weight, x), _placed(bias, x))


def group_norm(
    x: Any, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Any:
    """Returns x normalised over groups of channels."""
    batch, channels, *image = x.shape
    parts = x.reshape(batch, groups, channels // groups, *image)
    normed = layer_norm(parts, parts.shape[2:], eps=eps).reshape(x.shape)
    return _affine(normed, _placed(weight, x), _placed(bias, x))


# Convolutions


def convolution(rank: int) -> Callable[..., Any]:
    """Returns the convolution over so many dimensions."""

    def conv(
        x: Any,
        weight: Any,
        bias: Any = None,
        stride: Any = 1,
        padding: Any = 0,
        dilation: Any = 1,
        groups: int = 1,
    ) -> Any:
        each = lambda v: [v] * rank if isinstance(v, int) else list(v) * (rank // len(v))  # noqa: E731
        pads = padding.upper() if isinstance(padding, str) else [(p, p) for p in each(padding)]
        y = lax.conv_general_dilated(
            x, weight, each(stride), pads, rhs_dilation=each(dilation), feature_group_count=groups
        )
        return y if bias is None else y + bias.reshape(-1, *[1] * rank)

    return conv
