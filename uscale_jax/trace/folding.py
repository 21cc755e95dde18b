"""Arithmetic on uniform constants: what JAX leaves in a program of numbers that are known.

``jnp.var`` divides by ``n - ddof`` behind ``where(n - ddof > 0, ..., nan)``, attention by
``sqrt(d)``, indexing wraps negative literals: scalars all of them, and whoever reads a program
needs their values.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from uscale_jax.trace.program import Equation, is_empty, nothing

_Fold = Callable[..., Any]

_ARITHMETIC: dict[str, _Fold] = {
    "abs": np.abs,
    "add": np.add,
    "and": np.bitwise_and,
    "cbrt": np.cbrt,
    "ceil": np.ceil,
    "cos": np.cos,
    "eq": np.equal,
    "exp": np.exp,
    "exp2": np.exp2,
    "expm1": np.expm1,
    "floor": np.floor,
    "ge": np.greater_equal,
    "gt": np.greater,
    "is_finite": np.isfinite,
    "le": np.less_equal,
    "log": np.log,
    "log1p": np.log1p,
    "lt": np.less,
    "max": np.maximum,
    "min": np.minimum,
    "mul": np.multiply,
    "ne": np.not_equal,
    "neg": np.negative,
    "not": np.invert,
    "or": np.bitwise_or,
    "pow": np.power,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "sign": np.sign,
    "sin": np.sin,
    "sqrt": np.sqrt,
    "square": np.square,
    "sub": np.subtract,
    "tanh": np.tanh,
}

# Operations that only move elements, or repeat them: a uniform array stays what it is.
_LAYOUT = frozenset(
    (
        "broadcast_in_dim",
        "convert_element_type",
        "copy",
        "copy_p",
        "reshape",
        "squeeze",
        "stop_gradient",
        "transpose",
        "slice",
        "dynamic_slice",
        "expand_dims",
        "rev",
        "reduce_max",
        "reduce_min",
        "sharding_constraint",
        "device_put",
        "optimization_barrier",
        "pvary",
        "loop_slice",
        "loop_stack",
        "shard",
        "unshard",
    )
)


def fold(eqn: Equation) -> list[tuple[Any, ...] | None]:
    """Returns the uniform value of every output per program, None where it is not known."""
    known = [v.uniform for v in eqn.inputs]
    unknown = [None] * len(eqn.outputs)
    if eqn.name in ("loop_enter", "loop_close"):
        return [*unknown]
    if all(map(is_empty, eqn.outputs)):
        return [nothing(value, len(eqn.params)) for value in eqn.outputs]
    if not known or known[0] is None or any(map(is_empty, eqn.inputs)):
        return [*unknown]
    if eqn.name in _LAYOUT:
        return [_cast(known[0], eqn)]
    if any(k is None for k in known):
        return [*unknown]
    rule = _rule(eqn)
    if rule is None:
        return [*unknown]
    columns = zip(*(k for k in known if k is not None), strict=True)
    with np.errstate(all="ignore"):
        return [_cast(tuple(rule(*column) for column in columns), eqn)]


def _rule(eqn: Equation) -> _Fold | None:
    if eqn.name == "integer_pow":
        return lambda x: _integer_power(np.asarray(x), eqn.param("y"))
    if eqn.name == "div":
        return _divide if eqn.outputs[0].scales else _divide_integers
    if eqn.name == "select_n":
        return lambda which, *cases: cases[int(which)]
    return _ARITHMETIC.get(eqn.name)


def _integer_power(x: np.ndarray[Any, Any], y: int) -> Any:
    """In the widest dtype of its kind: integers, floating or complex numbers."""
    whole = np.issubdtype(x.dtype, np.integer)
    return np.power(x.astype(np.int64 if whole else np.result_type(x.dtype, np.float64)), y)


def _divide(a: Any, b: Any) -> Any:
    return np.divide(a, b)


def _divide_integers(a: Any, b: Any) -> Any:
    return np.trunc(np.divide(a, b))


def _cast(values: Sequence[Any], eqn: Equation) -> tuple[Any, ...] | None:
    """Casts to the output's dtype; JAX keeps in float32 what NumPy would widen.

    What becomes of a number beyond the integers of a dtype is the hardware's to say: None.
    """
    dtype = eqn.outputs[0].dtype
    if jnp.issubdtype(dtype, np.integer) and not all(_fits(v, dtype) for v in values):
        return None
    with np.errstate(all="ignore"):
        return tuple(np.asarray(v).astype(dtype)[()] for v in values)


def _fits(value: Any, dtype: Any) -> bool:
    """Whether a number is an integer, which wraps around, or one within those of a dtype."""
    if not jnp.issubdtype(np.asarray(value).dtype, np.inexact):
        return True
    bounds = jnp.iinfo(dtype)
    return bool(np.isfinite(value)) and bounds.min <= np.trunc(value) <= bounds.max


def chosen_case(eqn: Equation) -> int | None:
    """Returns which operand a ``select_n`` with a known predicate returns, if it is one."""
    if eqn.name != "select_n" or eqn.inputs[0].uniform is None:
        return None
    which = {int(w) for w in eqn.inputs[0].uniform}
    return which.pop() + 1 if len(which) == 1 else None
