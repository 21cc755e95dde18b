"""Factors for axes whose units are chosen, not copied: of learning rates, and of what is kept.

The rule for learning rates goes by how much larger an axis is, not by which units it has: the
equations of growth are solved for the ratio of the sizes, whole or not.

What is kept of a model whose units are removed is another matter.  Sums over the units that are
left are what they are, without the removed ones, so sums of products count as not growing at all;
means, and constants such as the 1/√d of attention, follow the sizes as they do in growth.
"""

from __future__ import annotations

from fractions import Fraction

from uscale_jax import _tree
from uscale_jax.trace import factors
from uscale_jax.trace.affine import ZERO
from uscale_jax.trace.atoms import alternatives, monomials
from uscale_jax.trace.description import Labelled
from uscale_jax.trace.equations import each_cell
from uscale_jax.trace.factors import Sums
from uscale_jax.trace.keep import Solution, fulfilled
from uscale_jax.trace.sizes import check_sizes
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.uneven import Powers


def by_size(traced: Traced) -> Solution:
    """Returns the factors of growth as if every axis were repeated as often as its ratio says.

    Raises:
      ValueError: an axis that is fixed has another size, or no factors keep the function.
    """
    check_sizes(traced)
    names = [_tree.name(key) for key in traced.keys]
    system = factors.build(traced.structure, names, shifting=True)
    return Solution(traced, system, fulfilled(traced, system), _no_powers(traced))


def of_kept(traced: Traced) -> Solution:
    """Returns by what the big model's leaves are larger than those of what is kept of it.

    1 where nothing else solves the equations.

    Raises:
      ValueError: an axis that is fixed has another size.
    """
    check_sizes(traced)
    names = [_tree.name(key) for key in traced.keys]
    system = factors.build(traced.structure, names, shifting=True, sums=_products(traced))
    try:
        cells = fulfilled(traced, system)
    except ValueError:
        cells = [each_cell(leaf, lambda _: ZERO) for leaf in system.leaf_cells]
    return Solution(traced, system, cells, _no_powers(traced))


def _products(traced: Traced) -> Sums:
    """Sums of products, which do not grow."""
    found = {}
    pairs = zip(traced.structure.program.equations, traced.structure.descriptions, strict=True)
    for eqn, what in pairs:
        if isinstance(what, Labelled) and len(eqn.inputs) > 1:
            for atom in what.summed:
                found[id(eqn), atom] = [ZERO] * alternatives((atom,))
    return found


def _no_powers(traced: Traced) -> list[Powers]:
    leaves = traced.structure.program.inputs[: len(traced.keys)]
    return [
        [[[Fraction(0)] * len(cell) for cell in monomials(dim)] for dim in traced.structure.of(v)]
        for v in leaves
    ]
