"""Factors as affine expressions: logarithms of what multiplies a value, in exact arithmetic.

An expression is a sum of symbols with rational coefficients.  Symbols are the unknown factors of
parameter cells (integers from 0), and known logarithms: of primes (``"2"``), of k (``"k"``), of a
number that is no simple power (``"~0.37"``).  Exact, so that growing twofold four times over gives
16 and not 15.999999.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

Symbol: TypeAlias = "int | str"
Number: TypeAlias = "int | Fraction"
Expr: TypeAlias = "dict[Symbol, Number]"

ZERO: Expr = {}

COPIES = "copies"
"""The symbol of how often a unit is repeated, where that is not equally often for all."""


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


def log_of_constants(small: float, big: float, epsilon: float) -> Expr:
    """Returns the logarithm of ``big / small``, exact where the rounded constants tell what it is.

    ``1/sqrt(24)`` and ``1/sqrt(12)`` in float32 are powers of integers up to rounding, and so are
    most constants that depend on sizes.  Else the simplest power of a fraction that explains the
    ratio is taken for it, if none that simple would fit by chance.  Anything else is a symbol of
    its own.
    """
    small, big = float(small), float(big)  # NumPy scalars divide in their own precision
    ratio = big / small
    for power in (1, 2, 4):
        for sign in (1, -1):
            whole = [_integer(x, sign * power, epsilon) for x in (small, big)]
            if None not in whole:
                return _root(Fraction(whole[1], whole[0]), sign * power)  # type: ignore[arg-type]
    powers = [power for power in (1, 2, 4) if power * abs(math.log(ratio)) < 600]
    fitting = [(*_simplest(ratio**power, 8 * power * epsilon), power) for power in powers]
    complexity, simple, power = min(fitting, default=(math.inf, Fraction(1), 1))
    if complexity * 8 * power * epsilon < 0.5:
        return _root(simple, power)
    digits = max(9, round(-math.log10(epsilon)) - 2)  # two ratios that rounding tells apart
    return {f"~{math.log(ratio):.{digits}g}": 1}


def _integer(x: float, power: int, epsilon: float) -> int | None:
    """The integer that ``x**power`` is, if rounding leaves no doubt."""
    try:
        raised = float(x) ** power
    except OverflowError:
        return None
    tolerance = 4 * abs(power) * epsilon
    if not 0.5 < raised < 0.05 / tolerance:
        return None
    whole = round(raised)
    return whole if math.isclose(whole, raised, rel_tol=tolerance) else None


def _simplest(x: float, tolerance: float) -> tuple[float, Fraction]:
    """The simplest fraction near ``x``, by the product of its terms; infinite if there is none."""
    bound = 1
    while bound <= 4096:
        simple = Fraction(x).limit_denominator(bound)
        if simple > 0 and math.isclose(simple, x, rel_tol=tolerance):
            return float(simple.numerator * simple.denominator), simple
        bound *= 2
    return math.inf, Fraction(1)


def _root(x: Fraction, power: int) -> Expr:
    return {s: _whole(Fraction(n, power)) for s, n in log_of(x).items()}


def _whole(x: Fraction) -> Number:
    return int(x) if x.denominator == 1 else x


def log_value(symbol: str) -> float:
    """Returns the number that a known symbol stands for; 1 for k and for copies."""
    if symbol in ("k", COPIES):
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


def total(expr: Mapping[Symbol, Number], found: Sequence[Expr]) -> Expr:
    """Returns an expression with every unknown replaced by its entry in ``found``."""
    out: Expr = {symbol: n for symbol, n in expr.items() if not isinstance(symbol, int)}
    for unknown in unknowns(expr):
        out = plus(out, found[unknown], expr[unknown])
    return out


def words(expr: Mapping[Symbol, Number], names: Mapping[int, str]) -> str:
    """Returns what an expression is the logarithm of: ``1/6 · 2^(1/2) · [kernel]^2``."""
    groups: dict[Number, list[str]] = {}
    number = Fraction(1)
    for symbol, power in expr.items():
        prime = isinstance(symbol, str) and symbol.isdigit()
        if prime and Fraction(power).denominator == 1:
            number *= Fraction(int(symbol)) ** int(power)
        else:
            groups.setdefault(power, []).append(_base(symbol, names))
    out = [] if number == 1 else [str(number)]
    for power, bases in groups.items():
        digits = [base for base in bases if base.isdigit()]
        others = [base for base in bases if not base.isdigit()]
        joined = [str(math.prod(map(int, digits)))] if digits else []
        out += [_power(base, power) for base in (*joined, *others)]
    return " · ".join(out) or "1"


def _base(symbol: Symbol, names: Mapping[int, str]) -> str:
    if isinstance(symbol, int):
        return f"[{names.get(symbol, 'carried')}]"
    return f"{math.exp(float(symbol[1:])):.4g}" if symbol.startswith("~") else symbol


def _power(base: str, number: Any) -> str:
    if number == 1:
        return base
    return f"{base}^({number})" if Fraction(number).denominator > 1 else f"{base}^{number}"
