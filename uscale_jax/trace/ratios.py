"""Factors for axes whose units are chosen, not copied: of learning rates, and of what is kept.

The rule for learning rates goes by how much larger an axis is, not by which units it has: the
equations of growth are solved for the ratio of the sizes, whole or not.

What is kept of a model whose units are removed is another matter.  Sums over the units that are
left are what they are, without the removed ones, so sums of products count as not growing at all;
means, and constants such as the 1/√d of attention, follow the sizes as they do in growth.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Mapping
from fractions import Fraction

from uscale_jax import _tree
from uscale_jax.trace import affine, factors, linear
from uscale_jax.trace.affine import ZERO, Expr
from uscale_jax.trace.atoms import Atom, leaves, monomials
from uscale_jax.trace.description import Labelled
from uscale_jax.trace.equations import each_cell, log_ratio
from uscale_jax.trace.factors import Sums
from uscale_jax.trace.keep import Solution, fulfilled
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing, check_sizes
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.uneven import Powers, Unequal, powers


def by_size(traced: Traced) -> Solution:
    """Returns the factors of growth as if every axis were repeated as often as its ratio says.

    Raises:
      ValueError: an axis that is fixed has another size, or no factors keep the function.
    """
    check_sizes(traced)
    names = [_tree.name(key) for key in traced.keys]
    system = factors.build(traced.structure, names, shifting=True)
    return Solution(traced, system, fulfilled(traced, system), _no_powers(traced))


def by_use(traced: Traced) -> Solution:
    """Returns the factors that every use of a leaf would have, though no factors keep the function.

    Raises:
      ValueError: an axis that is fixed has another size.
    """
    check_sizes(traced)
    names = [_tree.name(key) for key in traced.keys]
    system = factors.build(traced.structure, names, shifting=True)
    found = linear.nearest([], system.wishes(), system.weights())
    cells = [each_cell(leaf, lambda cell: affine.total(cell, found)) for leaf in system.leaf_cells]
    return Solution(traced, system, cells, _no_powers(traced))


def of_kept(traced: Traced, merged: Mapping[Atom, Merged]) -> Solution:
    """Returns by what the big model's leaves are larger than those of what is kept of it.

    1 where nothing else solves the equations.  Along ``merged`` axes equal units become one.

    Raises:
      ValueError: an axis that is fixed has another size.
    """
    check_sizes(traced)
    even = {atom for atom, how in merged.items() if how is Merged.EVENLY}
    averaged = _averaged(traced)
    apart = frozenset(
        atom
        for atom, how in merged.items()
        if how is Merged.UNEVENLY or (how is Merged.IN_PART and atom not in averaged)
    )
    apart, found = _powers(traced, apart)
    _as_read(traced, found, frozenset(merged) - even - apart)
    names, sums = [_tree.name(key) for key in traced.keys], _products(traced, even)
    system = factors.build(traced.structure, names, shifting=True, uneven=apart, sums=sums)
    try:
        cells = fulfilled(traced, system)
    except ValueError:
        cells = [each_cell(leaf, lambda _: ZERO) for leaf in system.leaf_cells]
    return Solution(traced, system, cells, found)


class Merged(enum.Enum):
    """How equal units of an axis become one."""

    EVENLY = enum.auto()
    """All of them, equally many each: growth undone."""
    UNEVENLY = enum.auto()
    """All of them, not equally many each."""
    IN_PART = enum.auto()
    """Some; others go."""


def _powers(traced: Traced, apart: frozenset[Atom]) -> tuple[frozenset[Atom], list[Powers]]:
    """What leaves take of the number of units that become one; and the axes where that is known."""
    while apart:
        try:
            return apart, powers(traced, apart)
        except Unequal as error:
            apart -= frozenset(error.atoms)
    return apart, _no_powers(traced)


def _as_read(traced: Traced, found: list[Powers], atoms: frozenset[Atom]) -> None:
    """Elsewhere what only sums over units is added up, and everything else is the mean."""
    known = roles(traced, atoms) if atoms else []
    values = traced.structure.program.inputs
    for leaf, own, value in zip(found, known, values, strict=False):
        for dim, role, cells in zip(leaf, own, traced.structure.of(value), strict=True):
            for power, cell in zip(dim, monomials(cells), strict=True):
                for i, atom in enumerate(cell):
                    if atom in atoms and role in (Role.READER, Role.SWITCH):
                        power[i] = Fraction(-1)


def _averaged(traced: Traced) -> set[Atom]:
    """The axes that are summed over otherwise than in products: norms and means."""
    pairs = zip(traced.structure.program.equations, traced.structure.descriptions, strict=True)
    return {
        inner
        for eqn, what in pairs
        if isinstance(what, Labelled) and len(eqn.inputs) == 1
        for atom in what.summed
        for inner in leaves((atom,))
    }


def _products(traced: Traced, but: Collection[Atom]) -> Sums:
    """Sums of products, which do not grow but along axes that are copied."""
    found: dict[tuple[int, Atom], list[Expr]] = {}
    apart = frozenset(changing(traced)) - set(but)
    pairs = zip(traced.structure.program.equations, traced.structure.descriptions, strict=True)
    for eqn, what in pairs:
        if isinstance(what, Labelled) and len(eqn.inputs) > 1:
            for atom in what.summed:
                found[id(eqn), atom] = [log_ratio(cell, apart) for cell in monomials((atom,))]
    return found


def _no_powers(traced: Traced) -> list[Powers]:
    leaves = traced.structure.program.inputs[: len(traced.keys)]
    return [
        [[[Fraction(0)] * len(cell) for cell in monomials(dim)] for dim in traced.structure.of(v)]
        for v in leaves
    ]
