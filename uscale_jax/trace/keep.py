"""Which factor every parameter takes for the function to stay the same, or why there is none."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from uscale_jax import _tree
from uscale_jax.trace import affine, factors, linear
from uscale_jax.trace.affine import Expr
from uscale_jax.trace.equations import NEVER, Cells, Requirement, System, each_cell
from uscale_jax.trace.sizes import check_sizes
from uscale_jax.trace.tracing import Traced, output_names


@dataclass(frozen=True)
class Solution:
    """What every cell of every parameter leaf is multiplied by, as logarithms.

    A leaf with a shift c, in ``system.shifts`` by its place, becomes f·(c + w) − c.
    """

    traced: Traced
    system: System
    cells: list[Cells]
    """Per leaf, expressions without unknowns."""


def solve(traced: Traced) -> Solution:
    """Returns the factors under which a big model is the same function as the small one.

    Among all solutions it is the one that departs least from what every use of a parameter would
    have it be: a kernel contracted over an axis that grows r-fold takes 1/r, anything else 1.

    Raises:
      ValueError: an axis that is fixed has another size in the big model, a size is no multiple,
        or equations contradict each other.
    """
    check_sizes(traced)
    system = factors.build(
        traced.structure, [_tree.name(key) for key in traced.keys], shifting=True
    )
    wanted = [*system.requirements, *_same_outputs(traced, system)]
    try:
        found = linear.nearest(
            [requirement.expr for requirement in wanted], wishes(system), weights(system)
        )
    except linear.Clash as clash:
        raise ValueError(clash_text([wanted[i] for i in clash.members], system)) from None
    cells = [
        each_cell(cells, lambda cell: affine.total(cell, found)) for cells in system.leaf_cells
    ]
    return Solution(traced, system, cells)


def wishes(system: System) -> dict[int, Expr]:
    """Returns what all uses of a parameter cell would have it be, where they agree."""
    return {u: uses[0] for u, uses in system.suggestions.items() if all(w == uses[0] for w in uses)}


def weights(system: System) -> list[float]:
    """Returns how much it counts that an unknown is not as wished for; auxiliary ones do not."""
    return [1.0 if name else 0.0 for name in system.names]


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
