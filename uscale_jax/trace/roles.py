"""How parameters are used along the axes that grow: what may make copies of a unit differ."""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from uscale_jax.trace.along import Along, Walk
from uscale_jax.trace.atoms import Atom, Dim, monomials
from uscale_jax.trace.tracing import Traced


class Role(enum.Enum):
    """What is known of how a parameter is used along a dimension that grows."""

    OTHER = "other"
    READER = "reader"
    """It is only ever summed over: what sums to 0 over the copies of every unit changes nothing."""
    SWITCH = "switch"
    """A reader of units that sums against readers are all that becomes of: 0 there drops a unit."""
    UNIT = "unit"
    """It makes such units."""


def roles(traced: Traced, changing: frozenset[Atom]) -> list[tuple[Role, ...]]:
    """Returns, per leaf and dimension, what is known of the ``changing`` axes there."""
    walk = Walk(traced, changing)
    leaves = walk.run()
    for value in traced.structure.program.outputs:
        if id(value) in walk.views:
            walk.used(walk.along(value, traced.structure.of(value)), summed=False)
    readers = walk.summed - walk.unsummed
    values = traced.structure.program.inputs
    dims = [
        [_Known.of(along, dim) for along, dim in zip(leaf, traced.structure.of(value), strict=True)]
        for leaf, value in zip(leaves, values, strict=False)
    ]
    kept = {atom for atom, by in walk.reductions if not by <= readers}
    units = _droppable(changing - kept, [d for leaf in dims for d in leaf if d.within(readers)])
    return [tuple(_role(readers, units, known) for known in leaf) for leaf in dims]


class _Known(NamedTuple):
    """The changing axes of a dimension of a leaf, and the unknowns of the leaf along them."""

    atoms: frozenset[Atom]
    unknowns: frozenset[Any]

    @staticmethod
    def of(along: Along, dim: Dim) -> _Known:
        """Return those of a dimension."""
        atoms = [atom for cell in monomials(dim) for atom in cell]
        powers = [power for cell in along for power in cell]
        pairs = [(a, p) for a, p in zip(atoms, powers, strict=True) if p is not None]
        return _Known(
            frozenset(atom for atom, _ in pairs),
            frozenset(next(iter(power), None) for _, power in pairs),
        )

    def within(self, readers: Collection[Any]) -> bool:
        """Return whether the leaf only reads along the dimension."""
        return bool(self.unknowns) and self.unknowns <= set(readers)


def _droppable(units: frozenset[Atom], readers: Sequence[_Known]) -> frozenset[Atom]:
    """Axes whose units all readers can do without: dimensions are switched off as a whole."""
    mixed = [known.atoms & units for known in readers if not known.atoms <= units]
    left = units - frozenset().union(*mixed)
    return left if left == units else _droppable(left, readers)


def _role(readers: set[Any], units: frozenset[Atom], known: _Known) -> Role:
    if not known.atoms or None in known.unknowns:
        return Role.OTHER
    if known.within(readers):
        return Role.SWITCH if known.atoms <= units else Role.READER
    return Role.UNIT if known.atoms <= units else Role.OTHER
