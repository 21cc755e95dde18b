"""Primitives on matrices in the last two dimensions: those hold still, batches pass through."""

from __future__ import annotations

from uscale_jax.trace.atoms import Dim, fresh
from uscale_jax.trace.description import UNSCALED, Dims, Kind, Labelled, Scale
from uscale_jax.trace.primitives import Rule, define, labels
from uscale_jax.trace.program import Equation, Value


def _matrices(scale: Scale) -> Rule:
    """Returns the rule of an operation on the matrices of its first operand."""

    def rule(eqn: Equation) -> Labelled:
        batch = labels(eqn.inputs[0])[:-2]
        held: list[Dim] = []
        operands = [_batched(value, batch, held) for value in eqn.inputs]
        results = [_batched(value, batch, held) for value in eqn.outputs]
        why = f"`{eqn.name}` works on whole matrices"
        return Labelled(operands, results, scale, fixed=[(dim, why) for dim in held])

    return rule


def _batched(value: Value, batch: Dims, held: list[Dim]) -> Dims:
    rest = [fresh(size) for size in value.shape[len(batch) :]]
    held += rest
    return [*batch, *rest]


def _triangular_solve(eqn: Equation) -> Labelled:
    """``x`` of ``a x = b`` or ``x a = b``: the other dimension of ``b`` is a batch too."""
    a, b = labels(eqn.inputs[0]), labels(eqn.inputs[1])
    b[:-2] = a[:-2]
    held = [*a[-2:], b[-2 if eqn.param("left_side") else -1]]
    scale = Scale(Kind.POWERS, (-1, 1))
    if eqn.param("unit_diagonal"):  # what stands on a's diagonal does not count, but 1
        scale = Scale(Kind.POWERS, (0, 1), bare=(0,))
    why = "`triangular_solve` works on whole matrices"
    return Labelled([a, b], [b], scale, fixed=[(dim, why) for dim in held])


define("cholesky", _matrices(Scale(Kind.POWERS, (0.5,))))
define("lu qr svd eigh eig schur hessenberg geqrf tridiagonal", _matrices(UNSCALED))
define("triangular_solve", _triangular_solve)
