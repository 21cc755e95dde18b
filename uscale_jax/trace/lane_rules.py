"""What equations make of new lanes: which facts hold of a result, and where one is defined."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from uscale_jax.trace import folding, lanes
from uscale_jax.trace.combine import LAYOUT
from uscale_jax.trace.description import Kind, Scale
from uscale_jax.trace.lanes import CONSTANT, Combine, Fact
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.signs import Sign

# Linear in every operand that a factor goes through with power 1.
LINEAR = LAYOUT | frozenset(
    (
        "all_gather",
        "all_gather_invariant",
        "all_to_all",
        "conj",
        "conv_general_dilated",
        "cumsum",
        "device_put",
        "dot_general",
        "dynamic_slice",
        "fft",
        "gather",
        "imag",
        "layout_constraint",
        "loop_stack",
        "mesh_cast",
        "mul",
        "name",
        "neg",
        "pbroadcast",
        "ppermute",
        "psum",
        "psum2",
        "psum_invariant",
        "pvary",
        "ragged_dot_general",
        "real",
        "reduce_precision",
        "reduce_scatter",
        "reduce_sum",
        "reduce_window_sum",
        "reshard",
        "rev",
        "stage",
        "tile",
        "unshard",
    )
)

# Linear in all operands together, or one operand here and another there.
ADDITIVE = frozenset(
    (
        "add",
        "add_any",
        "complex",
        "dynamic_update_slice",
        "scatter",
        "scatter-add",
        "scatter-sub",
        "select_n",
        "sub",
    )
)

# Beside those that folding knows.
_ZERO_AT_ZERO = frozenset(("asinh", "atan", "erf", "round", "sinh", "tan"))


def is_zero(value: Value) -> bool:
    """Returns whether a value is the constant 0."""
    return value.uniform is not None and all(number == 0 for number in value.uniform)


def is_linear(eqn: Equation, scale: Scale) -> bool:
    """Returns whether an equation is linear in every operand that :func:`of_product` counts."""
    return scale.kind is Kind.POWERS and eqn.name in LINEAR


def of_product(scale: Scale) -> Combine:
    """Returns the rule of a product; what points into it, as in ``gather``, must not vary."""
    count = len(scale.powers)

    def rule(facts: Sequence[Fact]) -> Fact:
        found = lanes.product(facts[:count])
        return found if all(Fact.SAME in f for f in facts[count:]) else found & Fact.ZERO

    return rule


def of_quotient(facts: Sequence[Fact]) -> Fact:
    """Returns what holds of a quotient."""
    divisor = CONSTANT if Fact.SAME in facts[1] else Fact.ANY
    return lanes.product([facts[0], divisor])


def of_centred(x: int) -> Combine:
    """Returns the rule of an operand less its mean over the axis: 0 where it is the mean."""
    return lambda facts: lanes.both(facts) | (facts[x] & Fact.MEAN and Fact.ZERO)


def of_copies(rule: Combine) -> Combine:
    """Returns a rule along a strided axis, whose ``MEAN`` is a copy: of copies come copies."""
    copied = lambda facts: all(Fact.MEAN in fact for fact in facts)  # noqa: E731
    return lambda facts: rule(facts) | (Fact.MEAN if copied(facts) else Fact.ANY)


def of_function(eqn: Equation) -> Combine:
    """Returns the rule of a function that nothing is known of, but its value at 0 perhaps."""

    def rule(facts: Sequence[Fact]) -> Fact:
        same = all(Fact.SAME in fact for fact in facts)
        zero = Fact.ZERO if _is_zero_at_zero(eqn, facts) else Fact.ANY
        return zero | (CONSTANT if same else Fact.ANY)

    return rule


def _is_zero_at_zero(eqn: Equation, facts: Sequence[Fact]) -> bool:
    """Whether the results are 0 where the operands are that are known to be."""
    if eqn.name in _ZERO_AT_ZERO:
        return Fact.ZERO in facts[0]
    inputs = [
        replace(value, uniform=(np.zeros((), value.dtype)[()],) * len(eqn.params))
        if Fact.ZERO in fact
        else value
        for value, fact in zip(eqn.inputs, facts, strict=True)
    ]
    found = folding.fold(replace(eqn, inputs=tuple(inputs)))
    return all(each is not None and not any(each) for each in found)


class Domain(NamedTuple):
    """Where a function is defined that is not everywhere."""

    operand: int
    sign: Sign | None
    """The sign of the operand that is enough, if any is."""
    facts: Fact
    """What else is enough: a mean of numbers lies where they do, as domains are convex."""


_MEAN = Fact.MEAN
_EITHER = Fact.MEAN | Fact.ZERO

_DOMAINS: dict[str, Domain] = {
    **dict.fromkeys(("div", "rem"), Domain(1, Sign.POSITIVE, _MEAN)),
    **dict.fromkeys(
        ("digamma", "integer_pow", "lgamma", "log", "pow", "rsqrt"),
        Domain(0, Sign.POSITIVE, _MEAN),
    ),
    **dict.fromkeys(("log1p", "sqrt"), Domain(0, Sign.NONNEGATIVE, _EITHER)),
    **dict.fromkeys(("acos", "asin", "atanh", "erf_inv"), Domain(0, None, _EITHER)),
    **dict.fromkeys(("acosh", "cholesky"), Domain(0, None, _MEAN)),
    **dict.fromkeys(
        (
            "igamma",
            "igamma_grad_a",
            "polygamma",
            "random_gamma",
            "regularized_incomplete_beta",
            "triangular_solve",
            "zeta",
        ),
        Domain(0, None, Fact.SAME),
    ),
}


def domain(eqn: Equation) -> Domain | None:
    """Returns where an equation is defined, if not everywhere."""
    whole_power = eqn.name == "integer_pow" and eqn.param("y") > 0
    return None if whole_power or not eqn.outputs[0].scales else _DOMAINS.get(eqn.name)
