"""Logarithms of factors: against floats, and what rounded constants are known to be exactly."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from uscale_jax.trace import affine
from uscale_jax.trace.affine import Expr, factor, log_of, log_of_constants, to_float, words

DTYPES = ["float64", "float32", "float16", "bfloat16"]

EXPRS = st.dictionaries(
    st.one_of(st.integers(0, 3), st.sampled_from(["2", "3", "k"])),
    st.fractions(-3, 3, max_denominator=6).filter(bool),
    max_size=4,
)


def rounded(x: float, dtype: str) -> np.generic:
    return np.asarray(x, jnp.dtype(dtype))[()]


def epsilon(dtype: str) -> float:
    return float(jnp.finfo(dtype).eps)


def read(small: float, big: float, dtype: str) -> Expr:
    """What two constants of a program, given as their dtype holds them, differ by."""
    return log_of_constants(rounded(small, dtype), rounded(big, dtype), epsilon(dtype))


# Arithmetic.


def test_sums_drop_what_cancels():
    assert affine.plus({0: 1, "2": 2}, {0: 1, "2": 1}, -2) == {0: -1}
    assert affine.plus({0: 1}, {1: 5}, 0) == {0: 1}
    assert affine.scaled({0: 1, "2": 2}, Fraction(1, 2)) == {0: Fraction(1, 2), "2": 1}
    assert affine.scaled({0: 1}, 0) == {}


@given(EXPRS, EXPRS, st.fractions(-3, 3, max_denominator=4))
def test_sums_are_those_of_every_symbol_and_change_no_operand(a, b, times):
    copies = dict(a), dict(b)
    out = affine.plus(a, b, times)
    assert (a, b) == copies
    for symbol in a.keys() | b.keys():
        assert out.get(symbol, 0) == a.get(symbol, 0) + times * b.get(symbol, 0)
    assert all(out.values())


def test_unknowns_are_replaced():
    expr: Expr = {0: 2, 1: -1, "2": 1}
    found: list[Expr] = [{"2": Fraction(1, 2)}, {"3": 1, "2": 2}]
    assert affine.unknowns(expr) == [0, 1]
    assert affine.total(expr, found) == {"3": -1}


@pytest.mark.parametrize(
    ("x", "exact"), [(0.5, Fraction(1, 2)), (1 / 3, Fraction(1, 3)), (-2.0, -2), (0.75, 0.75)]
)
def test_exponents_of_a_program_are_the_fractions_they_are(x, exact):
    assert affine.rational(x) == exact
    assert isinstance(affine.rational(x), int) == (exact == int(exact))


# Logarithms and their way back.


def test_logarithms_are_of_primes():
    assert log_of(Fraction(12)) == {"2": 2, "3": 1}
    assert log_of(Fraction(7, 12)) == {"7": 1, "2": -2, "3": -1}
    assert log_of(Fraction(1)) == {}
    assert log_of(Fraction(1, 7919)) == {"7919": -1}


@given(st.integers(1, 10**6), st.integers(1, 10**6))
def test_factors_of_rationals_come_back_exactly(a, b):
    ratio = Fraction(a, b)
    found = log_of(ratio)
    assert factor(found) == a / b
    assert math.isclose(to_float(found), math.log(a / b), rel_tol=1e-12, abs_tol=1e-12)
    for symbol in found:
        assert all(int(symbol) % d for d in range(2, math.isqrt(int(symbol)) + 1))


def test_four_doublings_are_sixteen():
    total: Expr = {}
    for _ in range(4):
        total = affine.plus(total, {"2": 1})
    assert factor(total) == 16.0
    assert factor(affine.plus(total, {"2": Fraction(1, 2)}, -8)) == 1.0


@given(st.dictionaries(st.sampled_from("235"), st.fractions(-4, 4, max_denominator=4)))
def test_factors_of_roots(expr):
    expected = math.prod(float(s) ** float(n) for s, n in expr.items())
    assert math.isclose(factor(expr), expected, rel_tol=1e-13)
    assert math.isclose(to_float(expr), math.log(expected), rel_tol=1e-12, abs_tol=1e-12)


def test_factors_of_what_is_no_simple_power():
    odd = log_of_constants(1.0, math.exp(0.3712345678901234), 2.0**-52)
    assert [*odd.values()] == [1]
    assert math.isclose(factor({**odd, "3": 1}), 3 * math.exp(0.3712345678901234), rel_tol=1e-13)


# Constants of programs.

FORMS = {
    "n": (lambda n: float(n), Fraction, 1),
    "1/n": (lambda n: 1 / n, Fraction, -1),
    "sqrt(n)": (math.sqrt, Fraction, Fraction(1, 2)),
    "1/sqrt(n)": (lambda n: 1 / math.sqrt(n), Fraction, Fraction(-1, 2)),
    "n**-0.25": (lambda n: n**-0.25, Fraction, Fraction(-1, 4)),
    "n - 1": (lambda n: n - 1.0, lambda n: Fraction(n - 1), 1),
    "1/(n - 1)": (lambda n: 1 / (n - 1), lambda n: Fraction(n - 1), -1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(n=st.integers(2, 3000), times=st.integers(2, 7))
def test_constants_that_depend_on_sizes_are_read_exactly(form, dtype, n, times):
    constant, whole, power = FORMS[form]
    expected = affine.scaled(log_of(whole(n * times) / whole(n)), power)
    assert read(constant(n), constant(n * times), dtype) == expected


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("n", [3, 5, 12, 48, 96, 100])
def test_doublings_are_read_exactly_in_low_precision(n, dtype):
    for form, power in {"n": 1, "1/n": -1, "sqrt(n)": 0.5, "1/sqrt(n)": -0.5}.items():
        assert read(FORMS[form][0](n), FORMS[form][0](2 * n), dtype) == {"2": power}


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_constants_differ_by_nothing(dtype):
    for x in (0.1, 1.702, 24.0, 1e-4):
        assert read(x, x, dtype) == {}


CONSTANTS = st.floats(1e-3, 1e3)


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=100)
@given(small=CONSTANTS, big=CONSTANTS)
def test_no_constant_is_read_as_another(small, big, dtype):
    """Whatever is read into it, the factor is the constants' ratio within a few roundings."""
    expr = read(small, big, dtype)
    ratio = float(rounded(big, dtype)) / float(rounded(small, dtype))
    few = max(10 * epsilon(dtype), 1e-12)
    assert math.isclose(math.exp(to_float(expr)), ratio, rel_tol=few)
    assert math.isclose(factor(expr), ratio, rel_tol=few)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@given(n=st.integers(2, 500), times=st.integers(2, 5), scale=CONSTANTS)
def test_a_common_factor_does_not_matter(n, times, scale, dtype):
    """0.17/n at both sizes: the ratio is simple although neither constant is."""
    assert read(scale / n, scale / (n * times), dtype) == log_of(Fraction(1, times))


@pytest.mark.parametrize("extreme", [1e-300, 1e300])
def test_extreme_constants_are_read_too(extreme):
    assert log_of_constants(extreme, 2 * extreme, 2.0**-52) == {"2": 1}
    assert log_of_constants(extreme, extreme / 3, 2.0**-52) == {"3": -1}


@pytest.mark.parametrize(("small", "big"), [(1e-200, 1e108), (1e100, 1e-100), (1e-45, 1e38)])
def test_extreme_ratios_are_read_too(small, big):
    """Their powers overflow."""
    found = to_float(log_of_constants(small, big, 2.0**-23))
    assert math.isclose(found, math.log(big) - math.log(small), rel_tol=1e-8)


def test_ratios_that_rounding_cannot_explain_stay_themselves():
    """1.702 to 0.1234567 in float64 are no simple fraction; near misses are not taken for one."""
    (symbol,) = read(1.702, 0.1234567, "float64")
    assert symbol.startswith("~")
    (symbol,) = read(1.0, 2.0 + 1e-9, "float64")
    assert symbol.startswith("~") or float(symbol) != 2


# Words.


@pytest.mark.parametrize(
    ("expr", "expected"),
    [
        ({}, "1"),
        ({"2": -1, "3": -1}, "1/6"),
        ({"2": 3}, "8"),
        ({"2": Fraction(1, 2), "3": Fraction(1, 2)}, "6^(1/2)"),
        ({"2": 1, "3": Fraction(-1, 2)}, "2 · 3^(-1/2)"),
        ({0: 1, 1: -2, "2": 1}, "2 · [kernel] · [carried]^-2"),
        ({"k": 2, 0: Fraction(1, 2)}, "k^2 · [kernel]^(1/2)"),
        ({"~0.693147180560": 1}, "2"),
        ({"~1": 2}, "2.718^2"),
    ],
)
def test_words(expr, expected):
    assert words(expr, {0: "kernel"}) == expected
