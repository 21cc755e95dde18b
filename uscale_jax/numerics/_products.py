"""Products at scale one: linear layers, matrix products, einsum and convolutions.

A product sums, over every combination of its indices, terms of an element of each operand.  Of N
terms that are independent and of scale one, the sum over the N/size that an element of a tensor
takes part in has scale √(N/size): that is the factor of the output and of both gradients.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from uscale_jax.numerics._constraints import Constraint, constrained
from uscale_jax.numerics._scale import floating, scale_bwd, scaled


def dot_general(
    lhs: ArrayLike,
    rhs: ArrayLike,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: DTypeLike | None = None,
    *,
    out_sharding: Any = None,
    constraint: Constraint = "to_output_scale",
) -> jax.Array:
    r"""Returns a product at scale one of activations and a weight, as ``jax.lax.dot_general``.

    .. math:: Y = s\,XW, \quad \bar X = b\,\bar Y W^\top, \quad
              \bar W = \text{rows}^{-1/2} X^\top \bar Y, \qquad
              s = \text{contracted}^{-1/2}, \; b = \text{columns}^{-1/2}

    for weights of scale one (initialised by ``jax.nn.initializers.normal(1.0)``).  Contracted is
    the size of the dimensions summed over, columns and rows those of the free dimensions of
    ``rhs`` and ``lhs``; batch dimensions do not count.  It goes where Flax takes a
    ``dot_general=``; a bias is then added by Flax, with factor 1 in both directions.

    Args:
      lhs: activations X.
      rhs: the weight W.  Its gradient's factor is not constrained.
      dimension_numbers: ((contracted of lhs, of rhs), (batch of lhs, of rhs)).
      precision: passed on.
      preferred_element_type: passed on.
      out_sharding: passed on.
      constraint: of s and b, as for :func:`constrained`.

    Returns:
      The product, in the dtype that ``jax.lax.dot_general`` gives.

    Raises:
      TypeError: an operand is not floating; from JAX, dimensions do not contract.
      ValueError: there is no such constraint; from JAX, as above.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> x = jax.random.normal(jax.random.key(0), (50, 100))
      >>> w = jax.random.normal(jax.random.key(1), (100, 200))
      >>> print(f"{jnp.std(un.dot_general(x, w, (((1,), (0,)), ((), ())))):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.1.
    """
    x, w = floating(lhs, "dot_general's lhs"), floating(rhs, "dot_general's rhs")
    f = partial(
        lax.dot_general,
        dimension_numbers=dimension_numbers,
        precision=precision,
        preferred_element_type=preferred_element_type,
        out_sharding=out_sharding,
    )
    out = jax.eval_shape(f, x, w)  # refuses what does not fit
    contracted = math.prod(x.shape[dim] for dim in dimension_numbers[0][0])
    factors = term_factors(out.size * contracted, out.size, x.size, w.size)
    return weighted(f, x, w, factors, constraint)


def linear(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    constraint: Constraint = "to_output_scale",
    precision: Any = None,
) -> jax.Array:
    r"""Returns a linear layer at scale one.

    .. math:: Y = s\,XW + b, \quad \bar X = s'\,\bar Y W^\top, \quad
              \bar W = n^{-1/2} X^\top \bar Y, \quad \bar b = n^{-1/2} \textstyle\sum \bar Y

    with s = fan_in^−½, s' = fan_out^−½ and n the number of rows of X.  The bias is outside of the
    factor, as in Flax with :func:`dot_general`: it moves outputs as far as its learning rate says
    at every width.  (Graphcore's library has it inside: its b is √fan_in times this one.)

    Args:
      x: activations of shape (..., fan_in).
      w: the weight, of shape (fan_in, fan_out), of scale one.
      b: the bias, of shape (fan_out,), usually zeros at first.
      constraint: of s and s', as for :func:`constrained`; the gradients of w and b have their own.
      precision: as in ``jax.lax.dot_general``.

    Returns:
      Outputs of shape (..., fan_out).

    Raises:
      TypeError: an operand is not floating; from JAX, sizes do not contract.
      ValueError: ``w`` is no matrix, ``b`` not of shape (fan_out,), no such constraint.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> x = jax.random.normal(jax.random.key(0), (50, 100))
      >>> w = jax.random.normal(jax.random.key(1), (100, 200))
      >>> print(f"{jnp.std(un.linear(x, w)):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.1.
    """
    return _linear(x, w, b, 0.5, constraint, precision)


def linear_readout(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None = None,
    *,
    constraint: Constraint = None,
    precision: Any = None,
) -> jax.Array:
    r"""Returns the last linear layer of a model: outputs of scale fan_in^−½, gradients of one.

    .. math:: Y = \text{fan\_in}^{-1} XW + b, \quad
              \bar X = \text{fan\_out}^{-1/2}\,\bar Y W^\top, \quad
              \bar W = n^{-1/2} X^\top \bar Y

    µP's output multiplier: outputs grow to scale one as weights learn to point along inputs.

    Args:
      x: as for :func:`linear`.
      w: as for :func:`linear`.
      b: as for :func:`linear`.
      constraint: as for :func:`linear`, but none by default, because no path leads around it.
      precision: as for :func:`linear`.

    Returns:
      Outputs of shape (..., fan_out).

    Raises:
      TypeError or ValueError: as :func:`linear`.

    Example:
      >>> import jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> print(un.linear_readout(jnp.ones((1, 4)), jnp.ones((4, 2))))
      [[1. 1.]]

    References:
      *u-µP*, 2024 (arXiv:2407.17465).
    """
    return _linear(x, w, b, 1.0, constraint, precision)


def matmul(
    a: ArrayLike,
    b: ArrayLike,
    *,
    constraint: Constraint = "to_output_scale",
    precision: Any = None,
) -> jax.Array:
    r"""Returns the product at scale one of two activations, as ``jnp.matmul``.

    .. math:: Y = s\,AB, \; \bar A = s_a\,\bar Y B^\top, \; \bar B = s_b\,A^\top \bar Y, \qquad
              s = n^{-1/2}, \; s_a = r^{-1/2}, \; s_b = l^{-1/2}

    for A of shape (..., l, n) and B of (..., n, r); an operand used by several batches (by
    broadcasting) counts them too.  Where n is a number of positions, s varies with it.

    Args:
      a: activations A.
      b: activations B.
      constraint: of s, s_a ("left") and s_b ("right"), as for :func:`constrained`.
      precision: as in ``jnp.matmul``.

    Returns:
      The product.

    Raises:
      TypeError: an operand is not floating; from JAX, sizes do not contract.
      ValueError: there is no such constraint; from JAX, shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> a, b = jax.random.normal(jax.random.key(0), (2, 100, 100))
      >>> print(f"{jnp.std(un.matmul(a, b)):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Table A.1.
    """
    left, right = floating(a, "matmul's a"), floating(b, "matmul's b")
    f = partial(jnp.matmul, precision=precision)
    out = jax.eval_shape(f, left, right)
    factors = term_factors(out.size * left.shape[-1], out.size, left.size, right.size)
    return scaled(f, *constrained(constraint, *factors))(left, right)


def einsum(
    subscripts: str,
    x: ArrayLike,
    w: ArrayLike,
    *,
    weight: bool = True,
    constraint: Constraint = "to_output_scale",
    precision: Any = None,
) -> jax.Array:
    r"""Returns an Einstein sum of two operands at scale one, as ``jnp.einsum``.

    .. math:: s = \prod_{i \notin Y} n_i^{-1/2}, \quad s_x = \prod_{i \notin X} n_i^{-1/2}, \quad
              s_w = \prod_{i \notin W} n_i^{-1/2}

    for the factors of the output and the two gradients, over the sizes n of indices that are not
    the tensor's own.

    Args:
      subscripts: as "bsd,dhk->bshk", with an arrow; "..." is allowed.
      x: activations.
      w: a weight, or more activations.
      weight: whether ``w`` is a weight, so that its gradient's factor is not constrained.
      constraint: of s and s_x ("grad_input"), or of s, s_x ("left") and s_w ("right"), as for
        :func:`constrained`.
      precision: as in ``jnp.einsum``.

    Returns:
      The sum.

    Raises:
      TypeError: an operand is not floating.
      ValueError: ``subscripts`` are not of two operands, have no arrow, or repeat an index within
        an operand; there is no such constraint; from JAX, shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from uscale_jax import numerics as un
      >>> x = jax.random.normal(jax.random.key(0), (50, 100))
      >>> w = jax.random.normal(jax.random.key(1), (100, 4, 25))
      >>> print(f"{jnp.std(un.einsum('sd,dhk->hsk', x, w)):.1f}")
      1.0

    References:
      Blake et al., *Unit Scaling*, 2023 (arXiv:2303.11257), Appendix E: products in general.
    """
    a, b = floating(x, "einsum's x"), floating(w, "einsum's w")
    terms = _combinations(subscripts, a.shape, b.shape)
    f = partial(jnp.einsum, subscripts, precision=precision)
    factors = term_factors(terms, jax.eval_shape(f, a, b).size, a.size, b.size)
    if weight:
        return weighted(f, a, b, factors, constraint)
    return scaled(f, *constrained(constraint, *factors))(a, b)


def term_factors(terms: float, *sizes: int) -> tuple[float, ...]:
    """Returns √(size/terms) of every tensor of a product that consists of so many terms."""
    return tuple(math.sqrt(max(size, 1) / max(terms, 1)) for size in sizes)


def weighted(
    f: Callable[..., jax.Array],
    x: jax.Array,
    w: jax.Array,
    factors: Sequence[float],
    constraint: Constraint,
) -> jax.Array:
    """Returns f(x, w) with factors on the output and both gradients; that of w is free."""
    output, grad, weight = factors
    return scaled(f, *constrained(constraint, output, grad), weight)(x, w)


def _combinations(subscripts: str, *shapes: tuple[int, ...]) -> int:
    """How many combinations of its indices an Einstein sum runs through."""
    inputs, arrow, _ = subscripts.replace(" ", "").partition("->")
    operands = inputs.split(",")
    if not arrow or len(operands) != len(shapes):
        raise ValueError(
            f"einsum takes two operands and an arrow, got {subscripts!r}. Expected: as in "
            "'bsd,dh->bsh'. Fix: write the output's indices out; sum more operands in turn."
        )
    sizes: dict[str, int] = {}
    for letters, shape in zip(operands, shapes, strict=True):
        indices = _indices(letters, len(shape))
        if len(set(indices)) != len(indices):
            raise ValueError(
                f"einsum cannot tell the scale of a diagonal: {letters!r} of {subscripts!r} "
                "repeats an index. Fix: take it first, jnp.diagonal(x)."
            )
        for index, size in zip(indices, shape, strict=False):  # else JAX says what does not fit
            sizes[index] = max(size, sizes.get(index, 1))
    return math.prod(sizes.values())


def _indices(letters: str, ndim: int) -> list[str]:
    """One name a dimension; those under an ellipsis are numbered from the right."""
    before, dots, after = letters.partition("...")
    hidden = range(ndim - len(before) - len(after), 0, -1) if dots else ()
    return [*before, *(f"...{n}" for n in hidden), *after]


def _linear(
    x: ArrayLike,
    w: ArrayLike,
    b: ArrayLike | None,
    power: float,
    constraint: Constraint,
    precision: Any,
) -> jax.Array:
    inputs, weight = floating(x, "linear's x"), floating(w, "linear's w")
    if weight.ndim != 2 or inputs.ndim == 0:
        raise ValueError(
            f"linear got x of shape {inputs.shape} and w of shape {weight.shape}. Expected: "
            "(..., fan_in) and (fan_in, fan_out). Fix: for weights of other shapes, einsum or "
            "dot_general."
        )
    fan_in, fan_out = weight.shape
    rows = inputs.size // max(fan_in, 1)
    factors = [max(n, 1) ** -p for n, p in ((fan_in, power), (fan_out, 0.5), (rows, 0.5))]
    contracted = (((inputs.ndim - 1,), (0,)), ((), ()))
    f = partial(lax.dot_general, dimension_numbers=contracted, precision=precision)
    out = weighted(f, inputs, weight, factors, constraint)
    return out if b is None else out + _bias(b, out, factors[-1])


def _bias(b: ArrayLike, out: jax.Array, factor: float) -> jax.Array:
    bias = floating(b, "linear's b")
    if bias.shape != out.shape[-1:]:
        raise ValueError(
            f"linear got b of shape {bias.shape}. Expected: {out.shape[-1:]}, one number for each "
            "output. Fix: pass a bias of the shape (fan_out,)."
        )
    return scale_bwd(bias, factor).reshape((1,) * (out.ndim - 1) + bias.shape)
