"""Axes whose units are not repeated equally often: what every parameter takes along each.

Where each unit of an axis is repeated r times, a sum over the axis is r times what it was.  Where
unit j is repeated :math:`m_j` times it is no multiple at all, unless place by place one of the
factors is divided by :math:`m_j`.  So every value has a power t of :math:`m_j` along every such
axis it has; a sum over the axis needs :math:`t = -1`, any other reduction :math:`t = 0`, and the
powers go through primitives as factors do.  With t = −1 the copies of a unit need not even be
equal: it is enough that their shares sum to 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import TypeAlias

from uscale_jax.trace import affine, linear
from uscale_jax.trace.affine import COPIES, ZERO
from uscale_jax.trace.along import Walk
from uscale_jax.trace.atoms import Atom
from uscale_jax.trace.equations import Requirement, System
from uscale_jax.trace.tracing import Traced

Powers: TypeAlias = "list[list[list[Fraction]]]"
"""Per dimension, per cell, per atom of the cell."""


class Unequal(Exception):
    """Units of ``atoms`` must be repeated equally often; ``members`` say why."""

    def __init__(
        self, members: Sequence[Requirement], atoms: Sequence[Atom], system: System
    ) -> None:
        """Keep what clashes."""
        super().__init__("units must be repeated equally often")
        self.members, self.atoms, self.system = members, atoms, system


def powers(traced: Traced, uneven: frozenset[Atom]) -> list[Powers]:
    """Returns, for every parameter leaf, the power of copies along each of its ``uneven`` axes.

    Raises:
      Unequal: an axis on which units must be repeated equally often.
    """
    walk = Walk(traced, uneven)
    leaves = walk.run()
    system = walk.system
    equations = [requirement.expr for requirement in system.requirements]
    try:
        found = linear.nearest(equations, system.wishes(), system.weights())
    except linear.Clash as clash:
        members = [system.requirements[i] for i in clash.members]
        raise Unequal(members, [walk.culprits[i] for i in clash.members], system) from None
    power = lambda t: Fraction(affine.total(t or ZERO, found).get(COPIES, 0))  # noqa: E731
    return [[[[power(t) for t in cell] for cell in dim] for dim in leaf] for leaf in leaves]
