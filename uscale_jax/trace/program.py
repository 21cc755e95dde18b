"""Programs as flat lists of equations over values, for one model or for two of one structure.

Calls are inlined with fresh values at every call site, loops and branches become equations that
enter, leave and join (:mod:`uscale_jax.trace.inline`), uniform constants are folded, dead code is
dropped.  What is left is a list that any analysis can walk once, from first to last.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax
from uscale_jax.trace.atoms import Size, ones
from uscale_jax.trace.source import Source


@dataclass(eq=False, slots=True)
class Value:
    """An array in a program."""

    shape: tuple[Size, ...]
    dtype: Any
    uniform: tuple[Any, ...] | None = None
    """The one number that all its elements are, per program, where that is known."""
    captured: tuple[Any, ...] | None = None
    """An array that the function closes over, per program."""

    @property
    def ndim(self) -> int:
        """Return the number of dimensions."""
        return len(self.shape)

    @property
    def scales(self) -> bool:
        """Return whether multiplying it by a factor means anything: floating or complex."""
        return bool(jnp.issubdtype(self.dtype, jnp.inexact))


@dataclass(eq=False, slots=True)
class Equation:
    """``outputs = name(*inputs)`` with parameters per program."""

    name: str
    params: tuple[Mapping[str, Any], ...]
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    source: Source | None
    needs: list[Equation] = field(default_factory=list)
    """Equations that must be kept if this one is: the closing of a loop it enters."""
    visit: int = -1
    """Which equation of the jaxpr it stands for, counted as calls, loops and branches are entered
    (:mod:`uscale_jax.trace.tapped` counts the same way when it runs the jaxpr)."""
    region: int = 0
    """Which loop body or branch it is in: what is of one region is run equally often."""

    def sizes(self, key: str) -> tuple[Size, ...]:
        """Return a parameter that is a sequence of numbers, as a size per entry."""
        return tuple(zip(*(map(int, p[key]) for p in self.params), strict=True))

    def number(self, key: str) -> Size:
        """Return a parameter that is a number, in every program."""
        return tuple(int(p[key]) for p in self.params)

    def param(self, key: str, default: Any = None) -> Any:
        """Return a parameter that is the same in every program."""
        return self.params[0].get(key, default)


@dataclass(eq=False, slots=True)
class Program:
    """A function of arrays: its inputs, its equations in order, its outputs."""

    inputs: tuple[Value, ...]
    captured: tuple[Value, ...]
    equations: list[Equation]
    outputs: tuple[Value, ...]
    count: int
    """How many programs are seen together: 1, or 2 for a small and a big model."""
    tables: Mapping[int, Source] | None = None
    """Where captured arrays are computed, by id, if axes may be strided (``trace.rotary``)."""


def value_of(avals: Iterable[Any]) -> Value:
    """Returns a new value for one variable, seen in every program."""
    avals = list(avals)
    shape = tuple(zip(*(aval.shape for aval in avals), strict=True))
    return Value(shape, avals[0].dtype)


def constant(arrays: Sequence[Any], avals: Sequence[Any]) -> Value:
    """Returns the value of a literal or of a captured array."""
    value = value_of(avals)
    if all(jnp.issubdtype(aval.dtype, jnp.number) or aval.dtype == bool for aval in avals):
        value.uniform = _uniform([numbers(a) for a in arrays])
    if value.uniform is None:
        value.captured = tuple(arrays)
    return value


def numbers(array: Any) -> np.ndarray[Any, Any] | None:
    """Returns what a captured array holds, random keys too; None for a traced one."""
    if _jax.is_traced(array):
        return None
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        array = jax.random.key_data(array)
    return np.asarray(array)


def _uniform(arrays: Sequence[np.ndarray[Any, Any] | None]) -> tuple[Any, ...] | None:
    shrunk = [None if a is None else without_repeats(a) for a in arrays]
    if any(a is None or a.size != 1 for a in shrunk):
        return None
    return tuple(a.reshape(-1)[0] for a in shrunk if a is not None)


def without_repeats(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns an array without the axes along which it does not vary."""
    for axis in range(array.ndim):
        if array.shape[axis] > 1:
            first = np.take(array, [0], axis=axis)
            if same_numbers(array, np.broadcast_to(first, array.shape)):
                array = first
    return array


def same_numbers(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> bool:
    """Returns whether two arrays are the same, NaN for NaN."""
    floating = jnp.issubdtype(a.dtype, jnp.inexact)
    return np.array_equal(a, b, equal_nan=bool(floating))


def without_dead_code(program: Program) -> Program:
    """Returns the program with only the equations and arrays that its outputs depend on."""
    producer = {id(v): eqn for eqn in program.equations for v in eqn.outputs}
    live: set[int] = set()
    todo = [producer[id(v)] for v in program.outputs if id(v) in producer]
    while todo:
        eqn = todo.pop()
        if id(eqn) not in live:
            live.add(id(eqn))
            todo += [producer[id(v)] for v in eqn.inputs if id(v) in producer]
            todo += eqn.needs
    kept = [eqn for eqn in program.equations if id(eqn) in live]
    used = {id(v) for values in (program.outputs, *(e.inputs for e in kept)) for v in values}
    captured = tuple(value for value in program.captured if id(value) in used)
    return replace(program, equations=kept, captured=captured)


def is_scalar_like(value: Value) -> bool:
    """Returns whether a value has one element in every program."""
    return all(map(ones, value.shape))


def is_empty(value: Value) -> bool:
    """Returns whether a value has no elements in any program."""
    return any(not any(size) for size in value.shape)


def nothing(value: Value, count: int) -> tuple[Any, ...] | None:
    """Returns what a value without elements is, which any number is; None for one with some."""
    if not is_empty(value) or jnp.issubdtype(value.dtype, jax.dtypes.extended):
        return None
    return (np.zeros((), value.dtype)[()],) * count
