"""PyTorch's operations as functions of JAX: what a model of Hugging Face is made of."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from uscale_jax._hf_layers import (
    addmm,
    attention,
    batch_norm,
    convolution,
    group_norm,
    layer_norm,
    linear,
    rms_norm,
    scaled,
)

Operation: TypeAlias = Callable[..., Any]

# Places


def _slice(x: Any, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    index = [slice(None)] * x.ndim
    index[dim] = slice(start, end, step)
    return x[tuple(index)]


def _select(x: Any, dim: int, index: int) -> Any:
    return jnp.squeeze(_slice(x, dim, index, index + 1 if index != -1 else None), dim)


def _split(x: Any, sizes: int | Sequence[int], dim: int = 0) -> list[Any]:
    total = x.shape[dim]
    if isinstance(sizes, int):
        sizes = [min(sizes, total - i) for i in range(0, total, sizes)]
    return jnp.split(x, np.cumsum(sizes)[:-1].tolist(), dim)


def _chunk(x: Any, chunks: int, dim: int = 0) -> list[Any]:
    return _split(x, -(-x.shape[dim] // chunks), dim)


def _view(x: Any, shape: Sequence[int], *_: Any, **__: Any) -> Any:
    return x.reshape(tuple(shape))


def _flatten(x: Any, start: int = 0, end: int = -1) -> Any:
    first, last = start % x.ndim, end % x.ndim
    return x.reshape(*x.shape[:first], -1, *x.shape[last + 1 :])


def _expand(x: Any, shape: Sequence[int], *, implicit: bool = False) -> Any:
    del implicit
    old = [1] * (len(shape) - x.ndim) + list(x.shape)
    wanted = [a if b == -1 else b for a, b in zip(old, shape, strict=True)]
    return jnp.broadcast_to(x, wanted)


def _squeeze(x: Any, dims: Any = None) -> Any:
    if dims is None:
        return jnp.squeeze(x)
    dims = [dims] if isinstance(dims, int) else dims
    return jnp.squeeze(x, tuple(d for d in dims if x.shape[d] == 1))


def _index(x: Any, places: Sequence[Any]) -> Any:
    return x[tuple(slice(None) if place is None else place for place in places)]


def _embedding(table: Any, places: Any, *_: Any, **__: Any) -> Any:
    return jnp.take(table, places, axis=0, mode="clip")


def _gather(x: Any, dim: int, index: Any, **_: Any) -> Any:
    return jnp.take_along_axis(x, index, dim)


# Numbers


def _reduction(function: Operation) -> Operation:
    def reduce(x: Any, dims: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
        x = x if dtype is None else x.astype(dtype_of(dtype))
        axes = None if dims is None or dims == [] else dims
        return function(
            x, tuple(axes) if isinstance(axes, list | tuple) else axes, keepdims=keepdim
        )

    return reduce


def _cast(x: Any, *_: Any, dtype: Any = None, **__: Any) -> Any:
    return x if dtype is None else x.astype(dtype_of(dtype))


def _to_dtype(x: Any, dtype: Any, *_: Any, **__: Any) -> Any:
    return x.astype(dtype_of(dtype))


def dtype_of(dtype: Any) -> Any:
    """Returns the dtype of JAX that PyTorch's is, of 64 bits where JAX has these."""
    name = str(dtype).removeprefix("torch.")
    return jax.dtypes.canonicalize_dtype(jnp.dtype(name))


def _softmax(x: Any, dim: int, dtype: Any = None, **_: Any) -> Any:
    wide = x if dtype is None or isinstance(dtype, bool) else x.astype(dtype_of(dtype))
    return jax.nn.softmax(wide, axis=dim)


def _plus(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return x + scaled(y, alpha)


def _minus(x: Any, y: Any, *, alpha: float = 1) -> Any:
    return x - scaled(y, alpha)


def _power(x: Any, exponent: Any) -> Any:
    whole = isinstance(exponent, int | float) and float(exponent).is_integer()
    return x ** int(exponent) if whole else x**exponent


def _batch_norm(x: Any, weight: Any, bias: Any, mean: Any, var: Any, *rest: Any) -> list[Any]:
    """Of its three results the last two are for training."""
    return [batch_norm(x, weight, bias, mean, var, False, *rest), None, None]


def _masked_fill(x: Any, mask: Any, value: Any) -> Any:
    return jnp.where(mask, jnp.asarray(value, x.dtype), x)


def _gelu(x: Any, *, approximate: str = "none") -> Any:
    return jax.nn.gelu(x, approximate=approximate == "tanh")


def _clamp(x: Any, low: Any = None, high: Any = None) -> Any:
    return jnp.clip(x, low, high)


def _same(x: Any, *_: Any, **__: Any) -> Any:
    return x


def _nothing(*_: Any, **__: Any) -> None:
    return None


_FUNCTIONS: Mapping[str, Operation] = {
    "abs": jnp.abs,
    "cos": jnp.cos,
    "div": jnp.true_divide,
    "eq": operator.eq,
    "erf": jax.scipy.special.erf,
    "exp": jnp.exp,
    "ge": operator.ge,
    "gt": operator.gt,
    "le": operator.le,
    "log": jnp.log,
    "logical_and": jnp.logical_and,
    "logical_not": jnp.logical_not,
    "logical_or": jnp.logical_or,
    "lt": operator.lt,
    "maximum": jnp.maximum,
    "minimum": jnp.minimum,
    "mul": operator.mul,
    "ne": operator.ne,
    "neg": operator.neg,
    "reciprocal": jnp.reciprocal,
    "relu": jax.nn.relu,
    "rsqrt": lax.rsqrt,
    "sigmoid": jax.nn.sigmoid,
    "silu": jax.nn.silu,
    "sin": jnp.sin,
    "softplus": jax.nn.softplus,
    "sqrt": jnp.sqrt,
    "square": jnp.square,
    "tanh": jnp.tanh,
    "where": jnp.where,
}
_PRODUCTS: Mapping[str, Operation] = {
    "addmm": addmm,
    "baddbmm": addmm,
    "bmm": operator.matmul,
    "conv1d": convolution(1),
    "conv2d": convolution(2),
    "einsum": lambda spec, operands, **_: jnp.einsum(spec, *operands),
    "embedding": _embedding,
    "linear": linear,
    "matmul": operator.matmul,
    "mm": operator.matmul,
    "scaled_dot_product_attention": attention,
}
_PLACES: Mapping[str, Operation] = {
    "cat": lambda parts, dim=0: jnp.concatenate(parts, dim),
    "chunk": _chunk,
    "expand": _expand,
    "flatten": _flatten,
    "gather": _gather,
    "index": _index,
    "permute": jnp.transpose,
    "repeat": jnp.tile,
    "reshape": _view,
    "select": _select,
    "slice": _slice,
    "split": _split,
    "split_with_sizes": _split,
    "squeeze": _squeeze,
    "stack": lambda parts, dim=0: jnp.stack(parts, dim),
    "t": jnp.transpose,
    "transpose": jnp.swapaxes,
    "unsqueeze": jnp.expand_dims,
    "view": _view,
    "_unsafe_view": _view,
}
_NUMBERS: Mapping[str, Operation] = {
    "_native_batch_norm_legit_no_training": _batch_norm,
    "_softmax": _softmax,
    "add": _plus,
    "batch_norm": batch_norm,
    "clamp": _clamp,
    "cumsum": lambda x, dim, *, dtype=None: jnp.cumsum(x, dim),
    "gelu": _gelu,
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "masked_fill": _masked_fill,
    "mean": _reduction(jnp.mean),
    "amax": _reduction(jnp.max),
    "pow": _power,
    "rms_norm": rms_norm,
    "rsub": lambda x, y, *, alpha=1: y - scaled(x, alpha),
    "softmax": _softmax,
    "sub": _minus,
    "sum": _reduction(jnp.sum),
    "_to_copy": _cast,
    "to": _to_dtype,
    "type_as": lambda x, other: x.astype(other.dtype),
}
_SAME: Mapping[str, Operation] = dict.fromkeys(
    ("alias", "clone", "contiguous", "detach", "dropout", "lift_fresh_copy"), _same
)

OPERATIONS: Mapping[str, Operation] = {
    **_FUNCTIONS,
    **_PRODUCTS,
    **_PLACES,
    **_NUMBERS,
    **_SAME,
    "_assert_tensor_metadata": _nothing,
    "getitem": operator.getitem,
}
"""By the name of PyTorch's operation, less its overload."""
