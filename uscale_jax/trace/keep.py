"""Which factor every parameter takes for the function to stay the same, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

from uscale_jax import _tree
from uscale_jax.trace import affine, factors, linear
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.equations import NEVER, Cells, Requirement, System, each_cell
from uscale_jax.trace.lanes import Fact
from uscale_jax.trace.sizes import check_sizes, describe_places, places, uneven
from uscale_jax.trace.tracing import Traced, output_names
from uscale_jax.trace.uneven import Powers, Unequal, powers


@dataclass(frozen=True)
class Solution:
    """What every cell of every parameter leaf is multiplied by, as logarithms.

    A leaf with a shift c, in ``system.shifts`` by its place, becomes f·(c + w) − c.
    """

    traced: Traced
    system: System
    cells: list[Cells]
    """Per leaf, expressions without unknowns."""
    copies: list[Powers]
    """Per leaf, the power of the number of copies along axes with unequally many."""
    lanes: list[Facts] | None = None
    """Per leaf, what it is on new lanes of axes whose units cannot all be copies."""


Facts: TypeAlias = "list[list[list[Fact | None]]]"
"""Per dimension, per cell, per atom of the cell; None along axes without new lanes."""


class NotEquallyOften(ValueError):
    """Sizes for which units cannot be repeated equally often, as they would have to be."""


def solve(traced: Traced) -> Solution:
    """Returns the factors under which a big model is the same function as the small one.

    Among all solutions it is the one that departs least from what every use of a parameter would
    have it be: a kernel contracted over an axis that grows r-fold takes 1/r, anything else 1.

    Raises:
      NotEquallyOften: units of an axis must be repeated equally often, and cannot be.
      ValueError: an axis that is fixed has another size in the big model, a size is smaller, or
        equations contradict each other.
    """
    check_sizes(traced)
    names = [_tree.name(key) for key in traced.keys]
    apart = uneven(traced)
    copies = _copies(traced, apart)
    system = factors.build(traced.structure, names, shifting=True, uneven=apart)
    return Solution(traced, system, fulfilled(traced, system), copies)


def fulfilled(traced: Traced, system: System) -> list[Cells]:
    """Returns the factors of all leaf cells under which equations hold and outputs stay.

    Raises:
      ValueError: the equations contradict each other.
    """
    wanted = [*system.requirements, *_same_outputs(traced, system)]
    try:
        found = linear.nearest(
            [requirement.expr for requirement in wanted], system.wishes(), system.weights()
        )
    except linear.Clash as clash:
        raise ValueError(clash_text([wanted[i] for i in clash.members], system)) from None
    return [each_cell(cells, lambda cell: affine.total(cell, found)) for cells in system.leaf_cells]


def _copies(traced: Traced, apart: frozenset[Atom]) -> list[Powers]:
    try:
        return powers(traced, apart)
    except Unequal as unequal:
        raise NotEquallyOften(_unequal_text(traced, unequal)) from None


def _unequal_text(traced: Traced, unequal: Unequal) -> str:
    """Returns which axes need their units repeated equally often, where they are, and why."""
    lines = ["the big model has sizes for which units would not be repeated equally often."]
    where = places(traced)
    for atom in dict.fromkeys(unequal.atoms):
        lines.append(f"  {atom.size[0]} (small), {atom.size[-1]} (big) is no multiple")
        lines.append(f"    {describe_places(where.get(atom, []))}")
    said = [
        f"  {text}" + ("" if source is None else f" at {source}")
        for _, text, source in unequal.members
    ]
    lines += dict.fromkeys(said)
    lines.append("Expected: a multiple of the small size. Fix: change the size in the big model.")
    return "\n".join(lines)


def _same_outputs(traced: Traced, system: System) -> list[Requirement]:
    return [
        Requirement(cell, f"{name} stays as it is", None)
        for name, cells in zip(output_names(traced.outputs), system.outputs, strict=True)
        for cell in cells.flat
        if cell
    ]


def _shifted(unknown: int, name: str, system: System) -> str:
    shift = system.shifts.get(system.leaf_of[unknown])
    return name if shift is None else f"{shift:g} + {name}"


def clash_text(members: Iterable[Requirement], system: System) -> str:
    """Returns a set of contradicting equations in words."""
    names = {u: _shifted(u, name, system) for u, name in enumerate(system.names) if name}
    lines = ["no factors keep the function: these contradict each other."]
    for expr, text, source in members:
        where = "" if source is None else f" at {source}"
        equation = "" if expr == NEVER else f": {affine.words(expr, names)} = 1"
        lines.append(f"  {text}{where}{equation}")
    lines.append(
        "Expected: factors of the leaves in brackets that make all of them hold. Fix: keep the "
        "size of the axes that these equations are about."
    )
    return "\n".join(lines)
