"""with_dot_general: any model, with its matrix products made by another function."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax import _jax, _track_rows
from uscale_jax._jax import JaxprEqn
from uscale_jax._track_rows import TrackedValue
from uscale_jax._types import Apply
from uscale_jax.trace import rebuilt
from uscale_jax.trace.replaced import Replaced


def with_dot_general(
    apply: Apply,
    dot_general: Callable[..., Any],
    *,
    where: Callable[[TrackedValue], bool] | None = None,
) -> Callable[..., Any]:
    r"""Returns ``apply`` with its matrix products made by another ``dot_general``.

    .. math:: y = x \cdot w \quad\to\quad y = \mathrm{dot\_general}(x, w)

    For models that take no ``dot_general=``, or not for all their products: einsums, attention
    scores, functions on arrays.  After :func:`unit_scale`, whose products read operands and
    gradients of size one, that is all it takes to train any model in float8:
    ``us.with_dot_general(unit.apply, us.fp8_dot_general())``.

    Products are met wherever they are: in calls, ``scan``, ``while`` and ``cond``,
    ``jax.checkpoint`` and ``shard_map``.  **Not looked into** are functions with derivative or
    batching rules of their own (``custom_vjp``, ``custom_jvp``, ``custom_vmap``), linear solvers
    and kernels; convolutions, ragged products, and products of integers or complex numbers stay.

    Args:
      apply: a pure function of any pytrees.
      dot_general: with the arguments of ``jax.lax.dot_general``: operands, dimension numbers,
        ``precision``, ``preferred_element_type`` and, where one is set, ``out_sharding``.
      where: which products, of all by default; they are described as :func:`track_scales` does:
        ``where=lambda value: "head" not in value.name``.

    Returns:
      A function of the same arguments and results.  Use it under ``jax.jit``.

    Raises:
      TypeError: when called, if ``dot_general`` returns another shape than the product has; another
        dtype is cast back.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> apply = lambda params, x: jnp.einsum("ij,jk->ik", x, params["up"]) @ params["head"]
      >>> params = {"up": jnp.full((5, 7), 0.1), "head": jnp.full((7, 3), 0.1)}
      >>> in_float8 = us.with_dot_general(
      ...     apply, us.fp8_dot_general(), where=lambda value: "head" not in value.name)
      >>> program = jax.make_jaxpr(in_float8)(params, jnp.ones((2, 5)))
      >>> str(program).count("f8_e4m3fn[5,7]") > 0, str(program).count("f8_e4m3fn[7,3]") > 0
      (True, False)

    References:
      Which products of a Transformer are worth it: Blake et al., *u-μP*, 2024 (arXiv:2407.17465),
      Section 4.
    """

    @wraps(apply)
    def replaced(*args: Any, **kwargs: Any) -> Any:
        arrays, call = rebuilt.by_arrays(apply, args, kwargs)
        closed, outputs = _jax.closed_jaxpr(call, arrays)
        names = _track_rows.input_names(apply, args, kwargs)
        rows = _track_rows.find(closed, names, where, factors=False).rows
        visits = {row.visit for row in rows}
        chosen = lambda eqn, visit: visit in visits and _is_product(eqn)  # noqa: E731
        found = Replaced(closed, chosen, lambda eqn: _made(eqn, dot_general)).run(arrays)
        return jax.tree.unflatten(jax.tree.structure(outputs), found)

    return replaced


def _is_product(eqn: JaxprEqn) -> bool:
    if _jax.primitive_name(eqn) != "dot_general":
        return False
    avals: list[Any] = [v.aval for v in eqn.invars]
    return all(jnp.issubdtype(aval.dtype, jnp.floating) for aval in avals)


def _made(eqn: JaxprEqn, dot_general: Callable[..., Any]) -> Callable[..., Any]:
    """The product of an equation by another function."""
    given = {key: eqn.params[key] for key in ("precision", "preferred_element_type")}
    if eqn.params.get("out_sharding") is not None:
        given["out_sharding"] = eqn.params["out_sharding"]
    expected: Any = eqn.outvars[0].aval

    def product(lhs: Any, rhs: Any) -> Any:
        found = dot_general(lhs, rhs, eqn.params["dimension_numbers"], **given)
        if jnp.shape(found) != expected.shape:
            raise TypeError(
                f"dot_general returned {jnp.shape(found)} for {jnp.shape(lhs)} by "
                f"{jnp.shape(rhs)}. Expected: {expected.shape}, as of jax.lax.dot_general with "
                f"dimension_numbers={eqn.params['dimension_numbers']}. Fix: pass these on to it."
            )
        return found.astype(expected.dtype)

    return product
