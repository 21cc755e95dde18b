"""What growth does to every parameter leaf: index maps, factors, numbers of copies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax.trace import affine, layout
from uscale_jax.trace.atoms import Atom, Dim, dim_size, monomials
from uscale_jax.trace.description import Dims
from uscale_jax.trace.equations import Cells, each_cell
from uscale_jax.trace.keep import Solution
from uscale_jax.trace.layout import Places, cell_of_place

Term: TypeAlias = "np.ndarray[Any, np.dtype[np.float64]]"
"""Numbers that broadcast against a leaf."""


class LeafGrowth(NamedTuple):
    """How a leaf of the big model is made from that of the small one.

    ``W' = f·(shift + W)[maps] − shift`` with f the product of ``factors``.
    """

    maps: tuple[Places | None, ...]
    """Per dimension, the place in the small leaf of every place in the big one; None for all."""
    factors: tuple[Term, ...]
    copies: tuple[Term, ...]
    """Their product is the number of copies of every element."""
    shift: float
    words: str
    """The factor in words."""
    partners: tuple[Places, ...]
    """Per dimension, -1 for the first copy of every unit; for copies that make a pair (the second
    and third, the fourth and fifth, ...), the place of the first of both; -2 for others."""


class _Line(NamedTuple):
    """What happens along one dimension."""

    old: Places
    copies: Term
    weight: Term
    partner: Places


def unit_map(atom: Atom) -> Places:
    """Returns the unit of the small model that every place of the big one is a copy of."""
    small, big = atom.size[0], atom.size[-1]
    return np.arange(big) * small // big


def leaf_growths(solution: Solution) -> list[LeafGrowth]:
    """Returns the growth of every leaf."""
    structure = solution.traced.structure
    found = []
    for i, cells in enumerate(solution.cells):
        value = structure.program.inputs[i]
        dims, powers = structure.of(value), solution.copies[i]
        lines = [_line(d, p) for d, p in zip(dims, powers, strict=True)]
        sizes = [dim_size(dim, 2) for dim in dims]
        maps = tuple(
            None if small == big and np.array_equal(line.old, np.arange(big)) else line.old
            for line, (small, big) in zip(lines, sizes, strict=True)
        )
        factors = _cell_factors(cells, dims) + _terms([line.weight for line in lines])
        words = _words(cells, dims, _shares(powers))
        shift = solution.system.shifts.get(i, 0.0)
        copies = _terms([line.copies for line in lines])
        if not value.scales:
            factors, words = (), "1"
        partners = tuple(line.partner for line in lines)
        found.append(LeafGrowth(maps, factors, copies, shift, words, partners))
    return found


def _line(dim: Dim, powers: Sequence[Sequence[Fraction]]) -> _Line:
    """Places of one cell, in order, are the row-major product of the cell's atoms."""
    cells = [cell_of_place(dim, program) for program in (0, -1)]
    count = len(cells[1])
    none = np.zeros(count, np.int64)
    line = _Line(none, np.ones(count), np.ones(count), np.full(count, -1))
    for cell, atoms in enumerate(monomials(dim)):
        small, big = (np.flatnonzero(each == cell) for each in cells)
        local, copies, weight = np.zeros(1, np.int64), np.ones(1), np.ones(1)
        for atom, power in zip(atoms, powers[cell], strict=True):
            old = unit_map(atom)
            each = np.bincount(old, minlength=atom.size[0])[old].astype(float)
            local = (local[:, None] * atom.size[0] + old).reshape(-1)
            copies = (copies[:, None] * each).reshape(-1)
            weight = (weight[:, None] * each ** float(power)).reshape(-1)
        line.old[big], line.copies[big], line.weight[big] = small[local], copies, weight
        line.partner[big] = _partners(atoms, big)
    return line


def _partners(atoms: Sequence[Atom], places: Places) -> Places:
    """Pairs differ along one axis, and are first copies along all others."""
    new, first, paired = np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, bool)
    for atom in atoms:
        rank, mate, complete = _pairs(unit_map(atom))
        new = (new[:, None] + (rank > 0)).reshape(-1)
        first = (first[:, None] * atom.size[-1] + mate).reshape(-1)
        paired = (paired[:, None] & (complete | (rank == 0))).reshape(-1)
    return np.where(new == 0, -1, np.where((new == 1) & paired, places[first], -2))


def _pairs(old: Places) -> tuple[Places, Places, Any]:
    """Which copy of its unit every place is, the first place of its pair, whether there are two."""
    starts = np.searchsorted(old, old)
    rank = np.arange(len(old)) - starts
    pair = (rank + 1) // 2
    mate = np.where(rank == 0, starts, starts + 2 * pair - 1)
    return rank, mate, np.bincount(old)[old] > 2 * pair


def _cell_factors(cells: Cells, dims: Dims) -> tuple[Term, ...]:
    found = layout.spread(each_cell(cells, affine.factor), dims, -1)
    return () if isinstance(found, float) and found == 1.0 else (np.asarray(found),)


def _terms(vectors: Sequence[Term]) -> tuple[Term, ...]:
    """Vectors along dimensions as arrays that broadcast; those that are one number as one."""
    number = math.prod(float(v.flat[0]) for v in vectors if _constant(v))
    found = [] if number == 1.0 else [np.asarray(number)]
    for i, vector in enumerate(vectors):
        if not _constant(vector):
            found.append(vector.reshape([-1 if j == i else 1 for j in range(len(vectors))]))
    return tuple(found)


def _constant(vector: Term) -> bool:
    return bool(vector.size) and bool(np.all(vector == vector.flat[0]))


def _shares(powers: Sequence[Sequence[Sequence[Fraction]]]) -> list[str]:
    """In words, what a leaf takes along dimensions whose units are not repeated equally often."""
    found = []
    for i, dim in enumerate(powers):
        each = {power for cell in dim for power in cell if power}
        if each:
            power = each.pop() if len(each) == 1 else None
            base = "powers of copies" if power is None else f"copies^({power})"
            found.append(f"{'1/copies' if power == -1 else base} along dimension {i}")
    return found


def _words(cells: Cells, dims: Dims, shares: Sequence[str]) -> str:
    """The factor of a leaf; where its parts differ, of those that take any."""
    words = each_cell(cells, lambda cell: affine.words(cell, {}))
    if all(word == words.flat[0] for word in words.flat):
        number = str(words.flat[0])
        return " · ".join([*([] if number == "1" and shares else [number]), *shares])
    parts = ", ".join(
        f"{words[place]} on {layout.cell_name(dims, place, cells.shape, -1)}"
        for place in np.ndindex(cells.shape)
        if words[place] != "1"
    )
    return " · ".join([parts, *shares])


def product(terms: Sequence[Term]) -> Any:
    """Returns the product of terms: a float, or an array that broadcasts against the leaf."""
    total = np.asarray(1.0)
    for term in terms:
        total = total * term
    return float(total) if total.ndim == 0 else total
