"""What is known of the values of a program in which some are zero.

A value is zero, it is one of the streams that a layer takes in, or it may be anything.  Each rule
is true whatever the other operands are, as long as they are finite.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Literal, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn
from uscale_jax.trace.flat import aval


class Stream(NamedTuple):
    """The numbers of a stream in their order; shape and dtype may be others on the way."""

    place: int
    """Which of the streams."""
    dtype: Any
    """The stream's own dtype, which holds its numbers."""
    nonnegative: bool


ZERO: Final = "zero"
State: TypeAlias = Stream | Literal["zero"] | None
"""What is known of a value; None if nothing is."""

States: TypeAlias = dict[Any, State]
_Reads: TypeAlias = Sequence[State]

# f(0) = 0, elementwise or along axes, or elements moved about: zeros give zeros.
_KEEP_ZEROS_NAMES = """
    abs add add_any all_gather all_to_all asin asinh atan atanh broadcast_in_dim cbrt ceil
    concatenate conj convert_element_type copy copy_p cummax cummin cumprod cumsum device_put erf
    erf_inv expand_dims expm1 fft floor imag log1p max min name neg optimization_barrier pad pcast
    pmax pmin ppermute psum psum_invariant pvary real reduce_max reduce_min reduce_precision
    reduce_prod reduce_sum reduce_window_max reduce_window_min reduce_window_sum reshape rev round
    sharding_constraint sign sin sinh slice sort split sqrt square squeeze stack stop_gradient sub
    tan tanh tile transpose unstack
"""
_KEEP_ZEROS = frozenset(_KEEP_ZEROS_NAMES.split())

# Elements stay in their order, so that what passes is the same numbers.
_PASS_NAMES = """
    broadcast_in_dim copy copy_p device_put expand_dims name optimization_barrier pcast pvary
    reshape sharding_constraint squeeze stop_gradient
"""
_PASS = frozenset(_PASS_NAMES.split())

# Zero if the operands at these places are.
_ZERO_AT = {
    "div": (0,),
    "dynamic_slice": (0,),
    "dynamic_update_slice": (0, 1),
    "gather": (0,),
    "scatter": (0, 2),
    "scatter-add": (0, 2),
    "scatter_add": (0, 2),
    "scatter-mul": (0,),
    "scatter_mul": (0,),
    "scatter-sub": (0, 2),
}

# Zero if any of the first two operands is.
_PRODUCTS = frozenset(
    ("conv_general_dilated", "dot_general", "mul", "ragged_dot", "ragged_dot_general")
)


def state(states: Mapping[Any, State], atom: Any) -> State:
    """Returns what is known of a variable or a literal."""
    if isinstance(atom, _jax.Literal):
        return ZERO if _number(atom) == 0 else None
    return states.get(atom)


def follow(eqns: Sequence[JaxprEqn], states: States, slices: Mapping[Any, Any]) -> None:
    """Adds what is known of the outputs of equations, in order.

    ``slices`` are variables that stand for a part of another variable.
    """
    for eqn in eqns:
        atoms = [v if isinstance(v, _jax.Literal) else slices.get(v, v) for v in eqn.invars]
        reads = [state(states, v) for v in atoms]
        if any(reads):
            states.update(zip(eqn.outvars, _outputs(eqn, reads), strict=True))


def _outputs(eqn: JaxprEqn, reads: _Reads) -> list[State]:
    name = _jax.primitive_name(eqn)
    if name in _jax.CALLS:
        return _called(_jax.called_program(name, eqn.params), reads)
    if name in _BODIES:
        return _BODIES[name](eqn, reads)
    if name in _PASS and not (name == "reshape" and eqn.params["dimensions"]):
        pairs = zip(eqn.invars, eqn.outvars, reads, strict=True)
        return [_passed(before, after, read) for before, after, read in pairs]
    if name in _RULES and (found := _RULES[name](eqn, reads)):
        return [found]
    return [ZERO if _is_zero(name, reads) else None] * len(eqn.outvars)


def _is_zero(name: str, reads: _Reads) -> bool:
    if name in _KEEP_ZEROS:
        return all(read == ZERO for read in reads)
    if name in _PRODUCTS:
        return ZERO in reads[:2]
    return name in _ZERO_AT and all(reads[place] == ZERO for place in _ZERO_AT[name])


def _passed(before: Any, after: Any, read: State) -> State:
    same = (before.aval.size, before.aval.dtype) == (after.aval.size, after.aval.dtype)
    return read if same or read == ZERO else None


def _number(atom: Any) -> Any:
    """Returns the number that a literal is, NaN for what is none."""
    value = np.asarray(atom.val) if isinstance(atom, _jax.Literal) else np.asarray(np.nan)
    known = value.size == 1 and jnp.issubdtype(value.dtype, np.number)
    return value.reshape(-1)[0] if known else np.nan


def _kept(eqn: JaxprEqn, read: State, place: int = 0) -> State:
    """Returns a stream that an elementwise equation leaves as it is."""
    same = aval(eqn.invars[place]).shape == aval(eqn.outvars[0]).shape
    return read if isinstance(read, Stream) and same else None


def _convert(eqn: JaxprEqn, reads: _Reads) -> State:
    """A stream stays itself in a wider dtype, and back in its own."""
    [read], old, new = reads, aval(eqn.invars[0]).dtype, aval(eqn.outvars[0]).dtype
    if isinstance(read, Stream) and (new == read.dtype or _holds(new, old)):
        return read
    return None


def _holds(wide: Any, narrow: Any) -> bool:
    """Returns whether every number of one floating dtype is one of another."""
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in (wide, narrow)):
        return bool(wide == narrow)
    a, b = jnp.finfo(wide), jnp.finfo(narrow)
    return bool(a.nmant >= b.nmant and a.maxexp >= b.maxexp and a.minexp <= b.minexp)


def _add(eqn: JaxprEqn, reads: _Reads) -> State:
    if ZERO not in reads:
        return None
    place = 1 - reads.index(ZERO)
    return _kept(eqn, reads[place], place)


def _sub(eqn: JaxprEqn, reads: _Reads) -> State:
    return _kept(eqn, reads[0]) if reads[1] == ZERO else None


def _mul(eqn: JaxprEqn, reads: _Reads) -> State:
    for place in (0, 1):
        if _number(eqn.invars[1 - place]) == 1:
            return _kept(eqn, reads[place], place)
    return None


def _div(eqn: JaxprEqn, reads: _Reads) -> State:
    return _kept(eqn, reads[0]) if _number(eqn.invars[1]) == 1 else None


def _max(eqn: JaxprEqn, reads: _Reads) -> State:
    """Relu leaves what is zero, and a stream that is a relu already."""
    for place, read in enumerate(reads):
        if isinstance(read, Stream) and read.nonnegative and reads[1 - place] == ZERO:
            return _kept(eqn, read, place)
        if read == ZERO and _number(eqn.invars[1 - place]) <= 0:
            return ZERO
    return None


def _min(eqn: JaxprEqn, reads: _Reads) -> State:
    pairs = zip(reads, reversed(eqn.invars), strict=True)
    return ZERO if any(read == ZERO and _number(other) >= 0 for read, other in pairs) else None


def _clamp(eqn: JaxprEqn, reads: _Reads) -> State:
    low, high = _number(eqn.invars[0]), _number(eqn.invars[2])
    return ZERO if reads[1] == ZERO and low <= 0 <= high else None


def _select(eqn: JaxprEqn, reads: _Reads) -> State:
    del eqn
    return reads[1] if all(case == reads[1] for case in reads[1:]) else None


def _power(eqn: JaxprEqn, reads: _Reads) -> State:
    exponent = eqn.params["y"] if "y" in eqn.params else _number(eqn.invars[1])
    if exponent == 1:
        return _kept(eqn, reads[0])
    return ZERO if reads[0] == ZERO and exponent > 0 else None


_RULES: dict[str, Callable[[JaxprEqn, _Reads], State]] = {
    "add": _add,
    "clamp": _clamp,
    "convert_element_type": _convert,
    "div": _div,
    "integer_pow": _power,
    "max": _max,
    "min": _min,
    "mul": _mul,
    "pow": _power,
    "select_n": _select,
    "sub": _sub,
}


def _called(body: ClosedJaxpr | Jaxpr, reads: _Reads) -> list[State]:
    jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
    states: States = dict(zip(jaxpr.invars, reads, strict=True))
    follow(jaxpr.eqns, states, {})
    return [state(states, v) for v in jaxpr.outvars]


def _zeros(reads: _Reads) -> list[State]:
    """Returns what is left to know where elements may have been moved."""
    return [ZERO if read == ZERO else None for read in reads]


def _repeated(
    body: ClosedJaxpr, before: _Reads, carried: _Reads, after: _Reads
) -> tuple[list[State], list[State]]:
    """Returns what is known of the carry however often a body runs, and of all its outputs."""
    carry = _zeros(carried)
    while True:
        outputs = _zeros(_called(body, [*before, *carry, *after]))
        following: list[State] = [
            new if old == ZERO else None for old, new in zip(carry, outputs, strict=False)
        ]
        if following == carry:
            return carry, outputs
        carry = following


def _scan(eqn: JaxprEqn, reads: _Reads) -> list[State]:
    known = _zeros(reads)
    n, c = _jax.scan_counts(eqn.params)
    body = eqn.params["jaxpr"]
    carry, outputs = _repeated(body, known[:n], known[n : n + c], known[n + c :])
    return carry + outputs[c:]


def _while(eqn: JaxprEqn, reads: _Reads) -> list[State]:
    known = _zeros(reads)
    m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
    return _repeated(eqn.params["body_jaxpr"], known[m : m + n], known[m + n :], ())[0]


def _cond(eqn: JaxprEqn, reads: _Reads) -> list[State]:
    first, *others = [_called(branch, reads[1:]) for branch in eqn.params["branches"]]
    columns = zip(first, *others, strict=True)
    return [found[0] if all(s == found[0] for s in found) else None for found in columns]


def _shard_map(eqn: JaxprEqn, reads: _Reads) -> list[State]:
    return _zeros(_called(eqn.params["jaxpr"], _zeros(reads)))


_BODIES: dict[str, Callable[[JaxprEqn, _Reads], list[State]]] = {
    "cond": _cond,
    "scan": _scan,
    "shard_map": _shard_map,
    "while": _while,
}
