"""Factors as affine expressions: logarithms of what multiplies a value, in exact arithmetic.

An expression is a sum of symbols with rational coefficients.  Symbols are the unknown factors of
parameter cells (integers from 0), and known logarithms: of primes (``"2"``), of k (``"k"``), of a
number that is no simple power (``"~0.37"``).  Exact, so that growing twofold four times over gives
16 and not 15.999999.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeAlias

Symbol: TypeAlias = "int | str"
Number: TypeAlias = "int | Fraction"
Expr: TypeAlias = "dict[Symbol, Number]"

ZERO: Expr = {}


def plus(a: Mapping[Symbol, Number], b: Mapping[Symbol, Number], times: Number = 1) -> Expr:
    """Returns ``a + times * b``."""
    out = dict(a)
    if not times:
        return out
    for symbol, number in b.items():
        total = out.get(symbol, 0) + times * number
        if total:
            out[symbol] = total
        else:
            out.pop(symbol, None)
    return out


def scaled(a: Mapping[Symbol, Number], times: Number) -> Expr:
    """Returns ``times * a``."""
    return {symbol: times * number for symbol, number in a.items()} if times else {}


def rational(x: float) -> Number:
    """Returns an exponent that a program holds as a float, such as 0.5, as the fraction it is."""
    exact = Fraction(x).limit_denominator(1024)
    return int(exact) if exact.denominator == 1 else exact


def log_of(ratio: Fraction) -> Expr:
    """Returns the logarithm of a positive rational number, in logarithms of primes."""
    out: Expr = {}
    for number, sign in ((ratio.numerator, 1), (ratio.denominator, -1)):
        for prime in _primes(number):
            out[str(prime)] = out.get(str(prime), 0) + sign
    return {symbol: number for symbol, number in out.items() if number}


def _primes(number: int) -> Iterable[int]:
    divisor = 2
    while divisor * divisor <= number:
        while number % divisor == 0:
            yield divisor
            number //= divisor
        divisor += 1
    if number > 1:
        yield number


def log_of_float(ratio: float, epsilon: float) -> Expr:
    """Returns the logarithm of a ratio of two rounded constants, exact where it is simple.

    ``1/sqrt(24) / (1/sqrt(12))`` in float32 is the square root of 1/2 up to rounding: the power of
    a simple fraction is taken for it.  Anything else is a symbol of its own.
    """
    for power in (1, 2, 4):
        simple = Fraction(ratio**power).limit_denominator(4096 if power == 1 else 256)
        if simple > 0 and math.isclose(float(simple), ratio**power, rel_tol=8 * power * epsilon):
            return {s: Fraction(n, power) for s, n in log_of(simple).items()}
    return {f"~{math.log(ratio):.9g}": 1}


def log_value(symbol: str) -> float:
    """Returns the number that a known symbol stands for; 1 for k."""
    if symbol == "k":
        return 1.0
    return float(symbol[1:]) if symbol.startswith("~") else math.log(int(symbol))


def to_float(known: Mapping[Symbol, Number]) -> float:
    """Returns the value of an expression without unknowns, as a logarithm."""
    return sum(float(number) * log_value(str(symbol)) for symbol, number in known.items())


def factor(known: Mapping[Symbol, Number]) -> float:
    """Returns what an expression without unknowns is the logarithm of, exact where possible."""
    out = Fraction(1)
    rest = 1.0
    for symbol, number in known.items():
        whole = Fraction(number)
        if whole.denominator == 1 and not str(symbol).startswith("~"):
            out *= Fraction(int(symbol)) ** int(whole)
        else:
            rest *= math.exp(float(number) * log_value(str(symbol)))
    return float(out) * rest


def unknowns(expr: Mapping[Symbol, Number]) -> list[int]:
    """Returns the unknowns of an expression."""
    return [symbol for symbol in expr if isinstance(symbol, int)]


def words(expr: Mapping[Symbol, Number], names: Mapping[int, str]) -> str:
    """Returns an expression as the product of powers it is the logarithm of."""
    if not expr:
        return "1"
    return " · ".join(_power(_base(symbol, names), number) for symbol, number in expr.items())


def _base(symbol: Symbol, names: Mapping[int, str]) -> str:
    if isinstance(symbol, int):
        return f"[{names.get(symbol, 'carried')}]"
    return f"{math.exp(float(symbol[1:])):.4g}" if symbol.startswith("~") else symbol


def _power(base: str, number: Any) -> str:
    return (
        base
        if number == 1
        else f"{base}^({number})"
        if Fraction(number).denominator > 1
        else f"{base}^{number}"
    )
