"""What growth does to every parameter leaf: index maps, factors, numbers of copies."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax.trace import affine, layout
from uscale_jax.trace.atoms import Atom, Dim, dim_size, monomials
from uscale_jax.trace.description import Dims
from uscale_jax.trace.equations import Cells, each_cell
from uscale_jax.trace.keep import Solution
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.layout import Places, cell_of_place
from uscale_jax.trace.program import Value
from uscale_jax.trace.units import NEW_MEAN, NEW_ZERO, Term, Units, units


class LeafGrowth(NamedTuple):
    """How a leaf of the big model is made from that of the small one.

    ``W' = f·(shift + W)[maps] − shift`` with f the product of ``factors``.
    """

    maps: tuple[Places | None, ...]
    """Per dimension, the place in the small leaf of every place in the big one; None for all.
    Negative for new places: -1 is 0, -2 the mean over the first of ``averages``, -3 over the
    second, and so on."""
    averages: tuple[tuple[Places, ...], ...]
    """Per dimension, sets of old places."""
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
    averages: list[Places]


_Facts: TypeAlias = "Sequence[Sequence[Fact | None]]"


Chosen: TypeAlias = "Mapping[Atom, Units]"
"""What the places of some axes are, if not copies of units one after the other."""


def leaf_growths(solution: Solution, chosen: Chosen | None = None) -> list[LeafGrowth]:
    """Returns the growth of every leaf."""
    values = solution.traced.structure.program.inputs
    return [_leaf_growth(solution, i, values[i], chosen or {}) for i in range(len(solution.cells))]


def _leaf_growth(solution: Solution, i: int, value: Value, chosen: Chosen) -> LeafGrowth:
    dims, powers, cells = solution.traced.structure.of(value), solution.copies[i], solution.cells[i]
    nothing: Any = [[[None] * len(cell) for cell in dim] for dim in powers]
    facts = nothing if solution.lanes is None else solution.lanes[i]
    strided = solution.traced.structure.strided.atoms
    rows = zip(dims, powers, facts, strict=True)
    lines = [_line(d, p, f, strided, chosen) for d, p, f in rows]
    pairs = zip(lines, (dim_size(dim, 2) for dim in dims), strict=True)
    factors = _cell_factors(cells, dims) + _terms([line.weight for line in lines])
    return LeafGrowth(
        maps=tuple(None if _is_all(line.old, size) else line.old for line, size in pairs),
        averages=tuple(tuple(line.averages) for line in lines),
        factors=factors if value.scales else (),
        copies=_terms([line.copies for line in lines]),
        shift=solution.system.shifts.get(i, 0.0),
        words=_words(cells, dims, _shares(powers)) if value.scales else "1",
        partners=tuple(line.partner for line in lines),
    )


def _is_all(old: Places, size: Sequence[int]) -> bool:
    return size[0] == size[-1] and np.array_equal(old, np.arange(size[-1]))


def _line(
    dim: Dim,
    powers: Sequence[Sequence[Fraction]],
    facts: _Facts,
    strided: frozenset[Atom],
    chosen: Chosen,
) -> _Line:
    """Places of one cell, in order, are the row-major product of the cell's atoms."""
    cells = [cell_of_place(dim, program) for program in (0, -1)]
    count = len(cells[1])
    none = np.zeros(count, np.int64)
    line = _Line(none, np.ones(count), np.ones(count), np.full(count, -1), [])
    for cell, atoms in enumerate(monomials(dim)):
        small, big = (np.flatnonzero(each == cell) for each in cells)
        pairs = zip(atoms, facts[cell], strict=True)
        along = [
            chosen[atom] if atom in chosen else units(atom, fact, strided=atom in strided)
            for atom, fact in pairs
        ]
        local, copies, weight = np.zeros(1, np.int64), np.ones(1), np.ones(1)
        for atom, each, power in zip(atoms, along, powers[cell], strict=True):
            local = (local[:, None] * atom.size[0] + each.unit).reshape(-1)
            copies = (copies[:, None] * each.copies).reshape(-1)
            weight = (weight[:, None] * each.copies ** float(power)).reshape(-1)
        line.old[big], line.copies[big], line.weight[big] = small[local], copies, weight
        line.partner[big] = _partners(along, big)
        if any(each.new.any() for each in along):
            line.old[big] = _with_new(atoms, along, small, line)
    return line


def _partners(along: Sequence[Units], places: Places) -> Places:
    """Pairs differ along one axis, and are first copies along all others."""
    new, first, paired = np.zeros(1, np.int64), np.zeros(1, np.int64), np.ones(1, bool)
    for each in along:
        new = (new[:, None] + (each.rank > 0)).reshape(-1)
        first = (first[:, None] * len(each.rank) + each.mate).reshape(-1)
        paired = (paired[:, None] & (each.paired | (each.rank == 0))).reshape(-1)
    return np.where(new == 0, -1, np.where((new == 1) & paired, places[first], -2))


def _with_new(atoms: Sequence[Atom], along: Sequence[Units], small: Places, line: _Line) -> Places:
    """Old places of a cell, and what its new ones are: means are taken along the new axes alone."""
    sizes = [atom.size[0] for atom in atoms]
    unit, new = _grid([each.unit for each in along]), _grid([each.new for each in along])
    found = small[np.ravel_multi_index(tuple(unit), sizes)]
    zero = (new == NEW_ZERO).any(0)
    made = (new < 0).any(0) & ~zero
    spans = np.where(new == NEW_MEAN, -1, unit)[:, made]
    each, which = np.unique(spans, axis=1, return_inverse=True)
    found[zero], found[made] = NEW_ZERO, NEW_MEAN - len(line.averages) - which.reshape(-1)
    for span in each.T:
        ranges = [np.arange(n) if i < 0 else [i] for i, n in zip(span, sizes, strict=True)]
        old = np.ravel_multi_index(np.ix_(*ranges), sizes).reshape(-1)
        line.averages.append(small[old])
    return found


def _grid(along: Sequence[Places]) -> Places:
    """All combinations of what is along each axis, row-major: one row an axis."""
    return np.stack([x.reshape(-1) for x in np.meshgrid(*along, indexing="ij")])


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
