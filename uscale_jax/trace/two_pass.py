"""Means in a program: where they are subtracted, and variances written in two passes.

``mean(x²) − mean(x)²`` is the variance of x only as a whole; ``mean((x − mean(x))²)`` is made of
terms that each say something.  The second form replaces the first, which equals it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from uscale_jax.trace.atoms import Size, ones, times
from uscale_jax.trace.axes import analyse
from uscale_jax.trace.program import Equation, Program, Value, without_dead_code
from uscale_jax.trace.tracing import Traced, output_names

# One operand of the result's shape, element for element the same number up to rounding.
_SAME = frozenset(
    ("convert_element_type", "copy", "copy_p", "stop_gradient", "reduce_precision", "name")
)


class Reduced(NamedTuple):
    """A value that is, up to its layout, a sum or mean of ``x`` or of its square."""

    x: Value
    """What is summed, or squared and summed."""
    root: Value
    """What ``x`` is a conversion of."""
    axes: frozenset[int]
    """Of ``x``, without those of size 1."""
    places: tuple[int | None, ...]
    """Per dimension, the one of ``x``; None where it has size 1 or is repeated."""
    squares: bool = False
    """Whether it is the square that is summed."""
    divided: bool = False
    """Whether by the number of terms: a mean."""
    squared: bool = False
    """Whether it is the square of that mean."""


def two_pass(program: Program) -> Program:
    """Returns the program with ``mean((x − mean(x))²)`` for ``mean(x²) − mean(x)²``."""
    means = Means(program)
    if not means.variances:
        return program
    equations: list[Equation] = []
    for eqn in program.equations:
        found = means.variances.get(id(eqn))
        equations += [eqn] if found is None else _variance(eqn, found, program.count)
    return without_dead_code(replace(program, equations=equations))


def padded_trace(traced: Traced) -> Traced:
    """Returns what is known of the program once its variances are written in two passes."""
    program = traced.structure.program
    rewritten = two_pass(program)
    if rewritten is program:
        return traced
    names = ["an input"] * (len(program.inputs) - len(traced.keys))
    outputs = output_names(traced.outputs)
    return traced._replace(structure=analyse(rewritten, names, outputs))


class Means:
    """Finds means, and what is done with them, in one walk over a program."""

    def __init__(self, program: Program) -> None:
        """Walk over the program."""
        self.roots: dict[int, Value] = {}
        self.squares: dict[int, Value] = {}
        self.reduced: dict[int, Reduced] = {}
        self.centred: dict[int, tuple[int, int]] = {}
        """By the id of a ``sub`` of x and its mean: which operand x is, and over which axis."""
        self.variances: dict[int, Reduced] = {}
        """By the id of a ``sub`` of the mean of squares and the square of the mean: the first."""
        for eqn in program.equations:
            if len(eqn.outputs) == 1 and eqn.outputs[0].scales:
                self._step(eqn)

    def _step(self, eqn: Equation) -> None:
        if eqn.name == "reduce_sum":
            self._sum(eqn)
        elif eqn.name == "sub":
            self._difference(eqn)
        elif _is_square(eqn):
            self._square(eqn)
        elif eqn.name in ("mul", "div"):
            self._product(eqn)
        else:
            self._layout(eqn)

    def _root(self, value: Value) -> Value:
        return self.roots.get(id(value), value)

    def _sum(self, eqn: Equation) -> None:
        operand = eqn.inputs[0]
        x = self.squares.get(id(operand), operand)
        gone = frozenset(eqn.param("axes"))
        kept = [i for i in range(x.ndim) if i not in gone]
        self.reduced[id(eqn.outputs[0])] = Reduced(
            x,
            self._root(x),
            frozenset(i for i in gone if not ones(x.shape[i])),
            tuple(None if ones(x.shape[i]) else i for i in kept),
            squares=x is not operand,
        )

    def _square(self, eqn: Equation) -> None:
        x = eqn.inputs[0]
        found = self.reduced.get(id(x))
        self.squares[id(eqn.outputs[0])] = x
        if found is not None and _is_mean(found):
            self.reduced[id(eqn.outputs[0])] = found._replace(squared=True)

    def _product(self, eqn: Equation) -> None:
        """A sum divided by its number of terms is a mean; a mean may be computed once a factor."""
        a, b = (self.reduced.get(id(value)) for value in eqn.inputs)
        if eqn.name == "mul" and a is not None and a == b and _is_mean(a):
            self.reduced[id(eqn.outputs[0])] = a._replace(squared=True)
        for i in (0, 1) if eqn.name == "mul" else (0,):
            found, by = self.reduced.get(id(eqn.inputs[i])), eqn.inputs[1 - i].uniform
            same = eqn.inputs[i].shape == eqn.outputs[0].shape
            if found is None or by is None or found.divided or not same:
                continue
            sign = 1 if eqn.name == "div" else -1
            count = times((found.x.shape[axis] for axis in found.axes), len(eqn.params))
            if _is_power(by, count, sign, eqn.outputs[0].dtype):
                self.reduced[id(eqn.outputs[0])] = found._replace(divided=True)

    def _difference(self, eqn: Equation) -> None:
        left, right = eqn.inputs
        a, b = self.reduced.get(id(left)), self.reduced.get(id(right))
        if a is not None and b is not None and _is_variance(a, b) and left.shape == right.shape:
            self.variances[id(eqn)] = a
        for i, (x, mean) in enumerate(((left, b), (right, a))):
            if mean is None or len(mean.axes) != 1 or x.shape != eqn.outputs[0].shape:
                continue
            if mean.root is self._root(x) and _is_mean_of(mean, x):
                self.centred[id(eqn)] = (i, next(iter(mean.axes)))

    def _layout(self, eqn: Equation) -> None:
        if not eqn.inputs:
            return
        value, out = eqn.inputs[0], eqn.outputs[0]
        if eqn.name in _SAME and value.scales and value.shape == out.shape:
            self.roots[id(out)] = self._root(value)
            if id(value) in self.squares:
                self.squares[id(out)] = self.squares[id(value)]
        found = self.reduced.get(id(value))
        places = None if found is None else _moved(eqn, found.places)
        if found is not None and places is not None:
            self.reduced[id(out)] = found._replace(places=places)


def _is_square(eqn: Equation) -> bool:
    if eqn.name == "mul":
        return eqn.inputs[0] is eqn.inputs[1]
    return eqn.name == "square" or (eqn.name == "integer_pow" and eqn.param("y") == 2)


def _is_power(numbers: Sequence[Any], sizes: Size, sign: int, dtype: Any) -> bool:
    """Whether numbers are sizes, or 1 over them, up to rounding."""
    tolerance = 4 * float(np.finfo(np.float64 if dtype == np.float64 else np.float32).eps)
    wanted = [float(size) ** sign for size in sizes]
    pairs = zip(numbers, wanted, strict=True)
    return all(abs(number - want) <= tolerance * want for number, want in pairs)


def _is_variance(left: Reduced, right: Reduced) -> bool:
    """Whether they are the mean of squares and the square of the mean, of the same."""
    first = left.squares and left.divided and not left.squared
    same = left.root is right.root and left.axes == right.axes and left.places == right.places
    return first and right.squared and same


def _is_mean(found: Reduced) -> bool:
    return found.divided and not (found.squares or found.squared)


def _is_mean_of(found: Reduced, x: Value) -> bool:
    """Whether it is the mean of ``x`` along axes, laid out as ``x`` is."""
    kept = {i for i, size in enumerate(x.shape) if not ones(size)} - found.axes
    there = {place for place in found.places if place is not None}
    fits = all(place in (None, i) for i, place in enumerate(found.places))
    return _is_mean(found) and fits and len(found.places) == x.ndim and there == kept


def _moved(eqn: Equation, places: Sequence[int | None]) -> tuple[int | None, ...] | None:
    """Where dimensions come to lie; None where that is not known."""
    value, out = eqn.inputs[0], eqn.outputs[0]
    if eqn.name in _SAME and value.shape == out.shape:
        return tuple(places)
    if eqn.name == "transpose":
        return tuple(places[i] for i in eqn.param("permutation"))
    if eqn.name == "broadcast_in_dim":
        moved: list[int | None] = [None] * out.ndim
        for i, place in zip(eqn.param("broadcast_dimensions"), places, strict=True):
            moved[i] = place
        return tuple(moved)
    if eqn.name in ("reshape", "squeeze", "expand_dims"):
        return _with_ones(value, out, places)
    return None


def _with_ones(
    value: Value, out: Value, places: Sequence[int | None]
) -> tuple[int | None, ...] | None:
    """Of a reshape that makes or drops dimensions of size 1."""
    full = [place for place, size in zip(places, value.shape, strict=True) if not ones(size)]
    before, after = ([s for s in v.shape if not ones(s)] for v in (value, out))
    if before != after:
        return None
    rest = iter(full)
    return tuple(None if ones(size) else next(rest) for size in out.shape)


def _variance(eqn: Equation, found: Reduced, count: int) -> list[Equation]:
    """Equations for ``mean((x − mean(x))²)`` that give the output of ``eqn``."""
    x, made = found.x, list[Equation]()
    gone = [i for i, size in enumerate(x.shape) if i in found.axes or ones(size)]
    kept = [i for i in range(x.ndim) if i not in gone]
    short = tuple(x.shape[i] for i in kept)
    size = times((x.shape[i] for i in gone), count)
    number = Value((), x.dtype, tuple(np.asarray(n, x.dtype)[()] for n in size))

    def emit(name: str, args: Sequence[Value], out: Value, **params: Any) -> Value:
        made.append(Equation(name, (params,) * count, tuple(args), (out,), eqn.source))
        return out

    def mean(value: Value) -> Value:
        total = emit("reduce_sum", [value], Value(short, x.dtype), axes=tuple(gone))
        return emit("div", [total, number], Value(short, x.dtype))

    full = Value(x.shape, x.dtype)
    emit("broadcast_in_dim", [mean(x)], full, broadcast_dimensions=tuple(kept))
    centred = emit("sub", [x, full], Value(x.shape, x.dtype))
    variance = mean(emit("square", [centred], Value(x.shape, x.dtype)))
    at = tuple(found.places.index(i) for i in kept)
    out = eqn.outputs[0]
    if variance.dtype != out.dtype:
        variance = emit("convert_element_type", [variance], Value(short, out.dtype))
    emit("broadcast_in_dim", [variance], out, broadcast_dimensions=at)
    return made
