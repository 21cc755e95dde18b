"""Values that cannot be negative, or not zero either, whatever the parameters are."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import TypeAlias

import jax.numpy as jnp

from uscale_jax.trace.combine import LAYOUT
from uscale_jax.trace.program import Equation, Program, Value


class Sign(enum.IntEnum):
    """What is known of all elements of a value."""

    ANY = 0
    NONNEGATIVE = 1
    POSITIVE = 2


_Rule: TypeAlias = Callable[[Sequence[Sign]], Sign]


def _sum(signs: Sequence[Sign]) -> Sign:
    return max(signs) if min(signs) else Sign.ANY


def _always(sign: Sign) -> _Rule:
    return lambda signs: sign


def _first(signs: Sequence[Sign]) -> Sign:
    return signs[0]


_RULES: dict[str, _Rule] = {
    **dict.fromkeys(("exp", "exp2", "logistic", "cosh", "erfc"), _always(Sign.POSITIVE)),
    **dict.fromkeys(("square", "abs"), lambda signs: max(signs[0], Sign.NONNEGATIVE)),
    **dict.fromkeys(("add", "add_any"), _sum),
    **dict.fromkeys(("mul", "div", "min", "concatenate", "dot_general"), min),
    **dict.fromkeys(("sqrt", "reduce_sum", "reduce_max", "reduce_min", *LAYOUT), _first),
    # log(1 + x) is defined where x is, as far as signs can tell, and of its sign
    **dict.fromkeys(("log1p", "expm1"), _first),
    "max": max,
    "rsqrt": lambda signs: Sign.POSITIVE if signs[0] else Sign.ANY,
    "select_n": lambda signs: min(signs[1:]),
}


def signs(program: Program) -> dict[int, Sign]:
    """Returns the sign of every value that is known to have one, by its id."""
    found: dict[int, Sign] = {}
    for eqn in program.equations:
        sign = _sign(eqn, [sign_of(value, found) for value in eqn.inputs])
        if sign:
            found |= dict.fromkeys(map(id, eqn.outputs), sign)
    return found


def sign_of(value: Value, known: dict[int, Sign]) -> Sign:
    """Returns the sign of a value, of a uniform constant too."""
    if value.uniform is None:
        return known.get(id(value), Sign.ANY)
    if not _is_real(value):
        return Sign.ANY
    if all(number > 0 for number in value.uniform):
        return Sign.POSITIVE
    return Sign.NONNEGATIVE if all(number >= 0 for number in value.uniform) else Sign.ANY


def _is_real(value: Value) -> bool:
    return not jnp.issubdtype(value.dtype, jnp.complexfloating)


def _sign(eqn: Equation, operands: Sequence[Sign]) -> Sign:
    if not operands or len(eqn.outputs) > 1 or not all(map(_is_real, (*eqn.inputs, *eqn.outputs))):
        return Sign.ANY
    even = eqn.name == "integer_pow" and eqn.param("y") % 2 == 0
    same = eqn.name == "mul" and eqn.inputs[0] is eqn.inputs[1]
    if even or same:
        return max(operands[0], Sign.NONNEGATIVE)
    return _RULES[eqn.name](operands) if eqn.name in _RULES else Sign.ANY
