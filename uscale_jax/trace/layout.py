"""Where along a dimension its parts lie: cells of leaves, as indices and as words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from uscale_jax.trace.atoms import Atom, Dim, alternatives, find, monomials, resolve
from uscale_jax.trace.description import Dims

Places = np.ndarray[Any, np.dtype[np.int64]]


def cell_of_place(dim: Dim, program: int) -> Places:
    """Returns the cell that every place along a dimension lies in, row-major, in one program."""
    cells = np.zeros(1, np.int64)
    for atom in resolve(dim):
        if atom.parts is None:
            inner = np.zeros(atom.size[program], np.int64)
        else:
            inner = _one_after_the_other(atom.parts, program)
        cells = (cells[:, None] * alternatives((atom,)) + inner).reshape(-1)
    return cells


def _one_after_the_other(parts: Sequence[Dim], program: int) -> Places:
    found, count = [], 0
    for part in parts:
        found.append(count + cell_of_place(part, program))
        count += alternatives(part)
    return np.concatenate(found)


def units_of_places(dim: Dim, atom: Atom, program: int) -> Places:
    """Returns the unit of an axis that every place along a dimension belongs to, -1 for none."""
    cells = cell_of_place(dim, program)
    units = np.full(len(cells), -1, np.int64)
    for cell, atoms in enumerate(monomials(dim)):
        if find(atom) in atoms:
            sizes = [each.size[program] for each in atoms]
            grid = np.indices(sizes)[atoms.index(find(atom))]
            units[cells == cell] = grid.reshape(-1)
    return units


def spread(cells: np.ndarray[Any, Any], dims: Dims, program: int) -> Any:
    """Returns numbers per cell as one number, or as an array that broadcasts against the leaf."""
    if all(cell == cells.flat[0] for cell in cells.flat):
        return float(cells.flat[0])
    index = [
        cell_of_place(dim, program) if n > 1 else np.zeros(1, np.int64)
        for dim, n in zip(dims, cells.shape, strict=True)
    ]
    return cells[np.ix_(*index)].astype(float)


def cell_name(dims: Dims, place: Sequence[int], counts: Sequence[int], program: int = 0) -> str:
    """Returns ``[:, 5:9]`` for the cell at ``place``; nothing for the only one of a leaf."""
    if all(n == 1 for n in counts):
        return ""
    parts = zip(dims, place, counts, strict=True)
    return "[" + ", ".join(":" if n == 1 else _run(dim, i, n, program) for dim, i, n in parts) + "]"


def _run(dim: Dim, cell: int, count: int, program: int) -> str:
    inside = np.flatnonzero(cell_of_place(dim, program) == cell)
    start, stop = int(inside[0]), int(inside[-1]) + 1
    return f"{start}:{stop}" if stop - start == len(inside) else f"part {cell + 1} of {count}"
