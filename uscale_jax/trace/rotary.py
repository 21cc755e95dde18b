"""Axes along which tables of numbers nest: the small model's are every k-th of the big model's.

Rotary embeddings turn pair i of a head of d places at the rate :math:`b^{-2i/d}`.  With k times
the places, pair k·i turns at the rate that pair i had: units go there, and all other pairs are
new (Su et al., *RoFormer*, 2021, arXiv:2104.09864, Eq. 15).  Nothing here knows of rotations; any
table that nests so does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from uscale_jax.trace.atoms import Atom, Reason, alternatives, fix, monomials
from uscale_jax.trace.layout import cell_of_place
from uscale_jax.trace.program import Program, Value, numbers

if TYPE_CHECKING:
    from uscale_jax.trace.axes import Structure

Array = np.ndarray[Any, Any]

CAPTURED = "indexes an array of numbers that the function closes over"

_ROUNDINGS = 16
_LOOSEST = 1e-3
"""How far tables may be apart, relative to their largest number, however long they are."""


class Strided(NamedTuple):
    """What is known of tables."""

    atoms: frozenset[Atom] = frozenset()
    """Axes whose units stay with the numbers they had, at every k-th place."""
    nested: frozenset[int] = frozenset()
    """Ids of values that the small model has at such places."""
    varying: frozenset[tuple[int, Atom]] = frozenset()
    """Ids of values, and axes along which their numbers differ."""


class _Cell(NamedTuple):
    """A part of a table, with an axis per atom, in the small and the big model."""

    atoms: tuple[Atom, ...]
    small: Array
    big: Array

    def varies(self, axis: int) -> bool:
        """Return whether numbers differ along an axis, in any of them."""
        return any(a.size and np.any(a != a.take([0], axis)) for a in (self.small, self.big))

    def distance(self, tabled: Sequence[bool]) -> float:
        """Return how far the small one is from its places in the big one."""
        pairs = list(zip(self.atoms, tabled, strict=True))
        first, step = slice(0, 1), lambda a: slice(None, None, a.size[-1] // a.size[0])
        big = self.big[tuple(step(atom) if varies else first for atom, varies in pairs)]
        small = self.small[tuple(slice(None) if varies else first for _, varies in pairs)]
        same = (small == big) | ((small != small) & (big != big))
        wide = np.result_type(small, np.float64)
        with np.errstate(invalid="ignore"):
            apart = np.where(same, 0, small.astype(wide) - big.astype(wide))
        largest = float(np.max(np.abs(apart), initial=0.0))
        return math.inf if math.isnan(largest) else largest


def is_postponed(program: Program, value: Value, axis: int) -> bool:
    """Returns whether it is for :func:`find` to say if an axis of a table can change."""
    if program.tables is None or value.captured is None or len(set(value.shape[axis])) == 1:
        return False
    return all(numbers(array) is not None for array in value.captured)


def find(structure: Structure) -> Strided:
    """Returns the axes along which tables nest; holds still the others along which they vary."""
    atoms, nested, varying = set[Atom](), set[int](), set[tuple[int, Atom]]()
    for value in structure.program.captured:
        if any(is_postponed(structure.program, value, axis) for axis in range(value.ndim)):
            cells = _cells(structure, value)
            fits = [_fits(structure.program, value, cell) for cell in cells]
            nested |= {id(value)} if all(fits) else set()
            found = {a for c in cells for i, a in enumerate(c.atoms) if c.varies(i)}
            varying |= {(id(value), atom) for atom in found}
            atoms |= {atom for atom in found if len(set(atom.size)) > 1}
    free = frozenset(atom for atom in atoms if atom.fixed is None)
    return Strided(free, frozenset(nested), frozenset(varying))


def _cells(structure: Structure, value: Value) -> list[_Cell]:
    dims = structure.of(value)
    assert value.captured is not None
    arrays = [np.asarray(numbers(value.captured[program])) for program in (0, -1)]
    places = [[cell_of_place(dim, program) for dim in dims] for program in (0, -1)]
    found = []
    for at in np.ndindex(*map(alternatives, dims)):
        atoms = tuple(a for dim, i in zip(dims, at, strict=True) for a in monomials(dim)[i])
        boxes = []
        for program, array in zip((0, -1), arrays, strict=True):
            cells = zip(places[program], at, strict=True)
            box = array[np.ix_(*(np.flatnonzero(own == i) for own, i in cells))]
            boxes.append(box.reshape([atom.size[program] for atom in atoms]))
        found.append(_Cell(atoms, *boxes))
    return found


def _fits(program: Program, value: Value, cell: _Cell) -> bool:
    """Whether a part of a table nests; where it does not, its axes are fixed."""
    tabled = [cell.varies(axis) for axis in range(len(cell.atoms))]
    changing = [a for a, varies in zip(cell.atoms, tabled, strict=True) if varies]
    for atom in changing:
        if len(set(atom.size)) == 1:
            fix((atom,), Reason(CAPTURED, _source(program, value)))
    changing = [atom for atom in changing if len(set(atom.size)) > 1]
    why = _objection(value, cell, tabled, changing)
    for atom in changing if why else ():
        fix((atom,), Reason(why, _source(program, value)))
    return not why


def _source(program: Program, value: Value) -> Any:
    assert value.captured is not None
    return (program.tables or {}).get(id(value.captured[0]))


def _objection(value: Value, cell: _Cell, tabled: Sequence[bool], changing: Sequence[Atom]) -> str:
    if any(atom.size[-1] % atom.size[0] for atom in changing):
        return "numbers differ along it, so that it can only grow by a whole factor"
    apart, allowed = cell.distance(tabled), _tolerance(value, cell)
    if apart <= allowed:
        return ""
    steps = dict.fromkeys(atom.size[-1] // atom.size[0] for atom in changing)
    where = " and ".join(f"0, {k}, {2 * k}, ..." for k in steps)
    return (
        f"numbers differ along it, and those of the small model are not at places {where} of the "
        f"big one ({apart:.1e} apart)"
    )


def _tolerance(value: Value, cell: _Cell) -> float:
    """Angles of late positions differ by as many roundings; integers by none.

    Tables are often computed in float32 and converted to what the model computes in.
    """
    if not jnp.issubdtype(value.dtype, jnp.inexact):
        return 0.0
    last = max([size[0] for size in value.shape if len(set(size)) == 1], default=1)
    rounding = min(_ROUNDINGS * last * float(np.finfo(np.float32).eps), _LOOSEST)
    small = np.abs(np.asarray(cell.small))
    largest = float(np.max(small[np.isfinite(small)], initial=0.0))
    return (rounding + 2 * float(jnp.finfo(value.dtype).eps)) * largest
