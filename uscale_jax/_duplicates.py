"""Units that are copies of each other, and units that nothing reads: proven from the parameters.

Two units are the same if what makes them is the same, and what makes them may itself be sums over
units that are the same.  So all units of an axis begin as one class, and classes are split until
in every leaf, summed over the classes of the axes that it sums over, the members of a class have
equal slices: the coarsest equitable partition, as in colour refinement of graphs.  Noise on
readers that sums to 0 over copies, uneven splits and all else that :func:`grow` does is seen
through; what training has told apart is not the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax
from uscale_jax._planning import Remade
from uscale_jax.trace.atoms import Atom, Dim, leaves
from uscale_jax.trace.layout import Places, units_of_places
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing

Array: TypeAlias = "np.ndarray[Any, Any]"

_DIRECTIONS = 4
_ROUNDINGS = 64
"""In units of the rounding of the leaf's dtype, how far apart slices of equal units may be."""


class Duplicates(NamedTuple):
    """What is known of the units of every axis that shrinks."""

    classes: Mapping[str, Array]
    """The class of every unit; equal units are of one class."""
    dead: Mapping[str, Array]
    """Whether all that reads a unit, and nothing else does, is zero."""


def duplicates(remade: Remade, params: Sequence[Any]) -> Duplicates:
    """Returns which units are equal, and which are dead, by axis."""
    work = [_Leaf(*each) for each in _known(remade, params)]
    atoms = list(remade.atoms.values())
    classes = {atom: np.zeros(atom.size[-1], np.int64) for atom in atoms}
    while True:
        split = {atom: _split(atom, classes, work) for atom in atoms}
        if all(split[atom].max() == classes[atom].max() for atom in atoms):
            break
        classes = split
    names = remade.atoms.items()
    dead = {name: _dead(atom, work) for name, atom in names}
    return Duplicates({name: classes[atom] for name, atom in names}, dead)


class _Leaf(NamedTuple):
    """A leaf with what is known of its dimensions."""

    values: Array
    epsilon: float
    dims: Sequence[Dim]
    roles: Sequence[Role]

    def summed(self, classes: Mapping[Atom, Array], but: int) -> Array:
        """Return the leaf summed over the classes along the dimensions it only sums over."""
        x = self.values
        for i, (dim, role) in enumerate(zip(self.dims, self.roles, strict=True)):
            if i != but and role in _READERS:
                x = _over(x, i, _place_classes(dim, classes))
        return x


_READERS = (Role.READER, Role.SWITCH)


def _known(remade: Remade, params: Sequence[Any]) -> Iterator[tuple[Any, ...]]:
    traced = remade.traced
    known = roles(traced, frozenset(changing(traced)))
    values = zip(traced.structure.program.inputs, known, params, strict=False)
    for value, own, leaf in values:
        if _factors.is_scaled(leaf):
            array, epsilon = np.asarray(_jax.fetched(leaf)), float(jnp.finfo(leaf.dtype).eps)
            wide = np.complex128 if np.iscomplexobj(array) else np.float64
            yield array.astype(wide), epsilon, traced.structure.of(value), own


def _place_classes(dim: Dim, classes: Mapping[Atom, Array]) -> Places:
    """A number for every place along a dimension: equal where all its units are equal."""
    found = None
    for atom in dict.fromkeys(leaves(dim)):
        units = units_of_places(dim, atom, -1)
        own = units if atom not in classes else np.where(units < 0, -1, classes[atom][units])
        both = own if found is None else found * (own.max() + 2) + own
        found = np.unique(both, return_inverse=True)[1].reshape(-1)
    return np.zeros(1, np.int64) if found is None else found


def _over(x: Array, axis: int, groups: Places) -> Array:
    """Sums over the places of every group along an axis."""
    moved = np.moveaxis(x, axis, 0)
    total = np.zeros((groups.max() + 1, *moved.shape[1:]), x.dtype)
    np.add.at(total, groups, moved)
    return np.moveaxis(total, 0, axis)


def _split(atom: Atom, classes: Mapping[Atom, Array], work: Sequence[_Leaf]) -> Array:
    """The classes of an axis, split where slices of what makes its units differ."""
    found = classes[atom]
    if found.max() + 1 == len(found):
        return found
    for leaf in work:
        for i, (dim, role) in enumerate(zip(leaf.dims, leaf.roles, strict=True)):
            units = units_of_places(dim, atom, -1)
            if role not in _READERS and (units >= 0).any():
                slices = _slices(leaf.summed(classes, i), i, units, atom.size[-1])
                found = _apart(found, slices, _ROUNDINGS * leaf.epsilon)
    return found


def _slices(x: Array, axis: int, units: Places, size: int) -> Array:
    """What a leaf has of every unit, as a row; places of a unit in their order."""
    inside = np.flatnonzero(units >= 0)
    order = inside[np.argsort(units[inside], kind="stable")]
    rows = np.moveaxis(x, axis, 0)[order]
    return rows.reshape(size, -1)


def _apart(classes: Array, slices: Array, tolerance: float) -> Array:
    """Splits classes whose rows differ, told by their products with a few random directions."""
    if np.iscomplexobj(slices):
        slices = np.concatenate([slices.real, slices.imag], 1)
    scale = np.sqrt(np.mean(np.square(slices))) or 1.0
    directions = np.random.default_rng(0).standard_normal((slices.shape[1], _DIRECTIONS))
    marks = slices @ directions / (scale * np.sqrt(slices.shape[1]))
    order = np.lexsort((marks[:, 0], classes))
    found, count = np.full(len(classes), -1, np.int64), 0
    for start, unit in enumerate(order):
        if found[unit] >= 0:
            continue
        found[unit] = count
        for other in order[start + 1 :]:
            if classes[other] != classes[unit] or marks[other, 0] - marks[unit, 0] > tolerance:
                break
            if np.all(np.abs(marks[other] - marks[unit]) <= tolerance):
                found[other] = count
        count += 1
    return _numbered(found)


def _numbered(classes: Array) -> Array:
    """Classes numbered by their first members."""
    _, first, which = np.unique(classes, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))
    return rank[which.reshape(-1)]


def _dead(atom: Atom, work: Sequence[_Leaf]) -> Array:
    """Units that all readers, and nothing else, read with zeros."""
    dead, read = np.ones(atom.size[-1], bool), False
    for leaf in work:
        for i, (dim, role) in enumerate(zip(leaf.dims, leaf.roles, strict=True)):
            units = units_of_places(dim, atom, -1)
            if role is Role.SWITCH and (units >= 0).any():
                read = True
                dead &= ~np.any(_slices(leaf.values, i, units, atom.size[-1]), axis=1)
    return dead & read
