"""The equations of a program: unknown factors of parameter cells, and what they must fulfil."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax.trace import affine
from uscale_jax.trace.affine import ZERO, Expr, plus
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.program import numbers, same_numbers, without_repeats
from uscale_jax.trace.source import Source

Cell: TypeAlias = "Expr | None"
"""An expression, or None for what no factor changes: zero, infinity, NaN."""

Cells: TypeAlias = "np.ndarray[Any, Any]"
"""Cells of a value, by dimension; length 1 along a dimension stands for all its cells."""


class Requirement(NamedTuple):
    """An equation ``expr = 0`` that keeps the function, and what asks for it."""

    expr: Expr
    text: str
    source: Source | None


# An equation that does not hold whatever the factors are: its text says all.
NEVER: Expr = {"~1": 1}


@dataclass
class System:
    """The equations of a program."""

    names: list[str] = field(default_factory=list)
    """Of every unknown; empty for auxiliary ones."""
    requirements: list[Requirement] = field(default_factory=list)
    leaf_cells: list[Cells] = field(default_factory=list)
    """Of every parameter leaf, the unknowns of its cells."""
    leaf_of: dict[int, int] = field(default_factory=dict)
    """The place among the leaves of every unknown that is a parameter cell."""
    shifts: dict[int, float] = field(default_factory=dict)
    """By the place among the leaves, the c of those whose cells are factors of ``c + leaf``."""
    suggestions: dict[int, list[Expr]] = field(default_factory=dict)
    """What every use of a parameter cell would have it be."""
    kernels: set[int] = field(default_factory=set)
    """Unknowns of what is summed over, or looked up."""
    outputs: list[Cells] = field(default_factory=list)

    def unknown(self, name: str = "") -> Expr:
        """Return a new unknown."""
        self.names.append(name)
        return {len(self.names) - 1: 1}

    def require(self, expr: Expr, text: str, source: Source | None) -> None:
        """Add an equation, unless it holds anyway."""
        if expr:
            self.requirements.append(Requirement(expr, text, source))

    def wishes(self) -> dict[int, Expr]:
        """Return what all uses of a parameter cell would have it be, where they agree."""
        uses = self.suggestions.items()
        return {u: wish[0] for u, wish in uses if all(w == wish[0] for w in wish)}

    def weights(self) -> list[float]:
        """Return how much it counts that an unknown is not as wished for; auxiliary ones do not."""
        return [1.0 if name else 0.0 for name in self.names]


def one_cell(cell: Cell, ndim: int) -> Cells:
    """Returns the cells of a value that is one cell."""
    cells = np.empty((1,) * ndim, object)
    cells[(0,) * ndim] = cell
    return cells


def each_cell(cells: Cells, fun: Callable[[Any], Any]) -> Cells:
    """Returns ``fun`` of every cell."""
    out = np.empty_like(cells)
    for place in np.ndindex(cells.shape):
        out[place] = fun(cells[place])
    return out


def log_ratio(atoms: Iterable[Atom], uneven: Container[Atom] = ()) -> Expr:
    """Returns by how much a product of atoms grows from the small program to the big one.

    Sums over ``uneven`` atoms do not become multiples (:mod:`uscale_jax.trace.uneven`).
    """
    total = ZERO
    for atom in atoms:
        if atom.size[0] != atom.size[-1] and atom not in uneven:
            total = plus(total, affine.log_of(Fraction(atom.size[-1], atom.size[0])))
    return total


def constant_cell(numbers: Sequence[Any], dtype: Any) -> Cell:
    """Returns by what factor a constant differs between the programs.

    Raises:
      ValueError: it is no factor (the sign changes, or only one is zero).
    """
    small, big = numbers[0], numbers[-1]
    if same_number(small, big):
        return None if not np.isfinite(small) or small == 0 else ZERO
    ratio = complex(big) / complex(small) if small != 0 else 0.0
    if ratio.imag or not np.isfinite(ratio.real) or ratio.real <= 0:
        raise ValueError(f"{small} (small), {big} (big)")
    return affine.log_of_constants(abs(small), abs(big), float(jnp.finfo(dtype).eps))


def is_absorbing(numbers: Sequence[Any]) -> bool:
    """Returns whether a constant is one that no factor changes: zero, infinity, NaN."""
    return all(not np.isfinite(number) or number == 0 for number in numbers)


def same_number(a: Any, b: Any) -> bool:
    """Returns whether two numbers are the same, NaN for NaN."""
    return bool(a == b) or bool(np.isnan(a) and np.isnan(b))


def same_arrays(small: Any, big: Any) -> bool:
    """Whether captured arrays are the same but for axes along which they do not vary."""
    if small is big:
        return True
    arrays = [numbers(small), numbers(big)]
    a, b = (None if x is None else without_repeats(x) for x in arrays)
    return a is not None and b is not None and same_numbers(a, b)
