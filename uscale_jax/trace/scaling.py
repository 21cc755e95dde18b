"""What becomes of a model's outputs when the values of its parameters are multiplied."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from uscale_jax import _tree
from uscale_jax.trace import affine, factors, linear
from uscale_jax.trace.affine import Expr, Number
from uscale_jax.trace.equations import Cells, Requirement, System, each_cell
from uscale_jax.trace.tracing import Traced

K: Expr = {"k": 1}

# Among exponents that are no solution as they are, those of kernels are the last to give way:
# biases follow the kernels before them, not the other way round.
_KERNEL, _OTHER = 1000.0, 1.0


class Violation(NamedTuple):
    """An equation that does not hold when every parameter is multiplied by k."""

    requirement: Requirement
    words: str
    """What must be 1 and is not."""


class Uniform(NamedTuple):
    """What multiplying every parameter by k does."""

    outputs: list[Number]
    """The power of k of every output; only right if nothing is violated."""
    violations: list[Violation]


class Nearest(NamedTuple):
    """Exponents near 1 that make every output scale by a power of k."""

    leaves: list[Number]
    outputs: list[Number]


def system_of(traced: Traced) -> System:
    """Returns the equations of one model."""
    return factors.build(traced.structure, [_tree.name(key) for key in traced.keys])


def uniform(system: System, names: Sequence[str]) -> Uniform:
    """Returns what the outputs called ``names`` do when every parameter is multiplied by k."""
    rows: linear.Rows = dict.fromkeys(_parameters(system), K)
    wanted = [*system.requirements, *_outputs_in_step(system, names)]
    failing = linear.assume([requirement.expr for requirement in wanted], rows)
    words = {u: name for u, name in enumerate(system.names) if name}
    violations = [
        Violation(
            wanted[i],
            f"{affine.words(wanted[i].expr, words)} must be 1, is {affine.words(left, {})}",
        )
        for i, left in failing.items()
    ]
    return Uniform([_exponent(cells, rows) for cells in system.outputs], violations)


def nearest(system: System, names: Sequence[str]) -> Nearest:
    """Returns the exponents nearest to 1, one a leaf, under which outputs scale."""
    equations = [requirement.expr for requirement in system.requirements]
    equations += [requirement.expr for requirement in _outputs_in_step(system, names)]
    for cells in system.leaf_cells:
        equations += _ties(cells)
    wishes = dict.fromkeys(_parameters(system), K)
    weights = [
        (_KERNEL if u in system.kernels else _OTHER) if name else 0.0
        for u, name in enumerate(system.names)
    ]
    found = dict(enumerate(linear.nearest(equations, wishes, weights)))
    return Nearest(
        [_exponent(cells, found) for cells in system.leaf_cells],
        [_exponent(cells, found) for cells in system.outputs],
    )


def symmetries(system: System) -> list[dict[int, Number]]:
    """Returns a basis of the rescalings that leave all outputs as they are, by parameter cell."""
    equations = [requirement.expr for requirement in system.requirements]
    equations += [cell for cells in system.outputs for cell in cells.flat if cell]
    basis = linear.null_space(equations, len(system.names))
    parameters = set(_parameters(system))
    vectors = [{u: n for u, n in vector.items() if u in parameters} for vector in basis]
    return linear.sparser([vector for vector in vectors if vector])


def by_leaf(system: System, vector: Mapping[int, Number]) -> dict[int, Cells]:
    """Returns exponents by cell for every leaf that has any."""
    leaves = dict.fromkeys(system.leaf_of[u] for u in vector)
    return {
        i: each_cell(
            system.leaf_cells[i], lambda cell: sum(n * vector.get(u, 0) for u, n in cell.items())
        )
        for i in leaves
    }


def _parameters(system: System) -> Iterable[int]:
    return [u for u, name in enumerate(system.names) if name]


def _ties(cells: Cells) -> list[Expr]:
    present = [cell for cell in cells.flat if cell is not None]
    return [affine.plus(cell, present[0], -1) for cell in present[1:] if cell != present[0]]


def _outputs_in_step(system: System, names: Sequence[str]) -> list[Requirement]:
    """All parts of an output take the same factor."""
    return [
        Requirement(expr, f"the parts of {name} take the same factor", None)
        for name, cells in zip(names, system.outputs, strict=True)
        for expr in _ties(cells)
    ]


def _exponent(cells: Cells, found: linear.Rows) -> Number:
    """The power of k of the first cell that has one; a free unknown counts as 0."""
    for cell in cells.flat:
        if cell is not None:
            return linear.substitute(cell, found).get("k", 0)
    return 0
