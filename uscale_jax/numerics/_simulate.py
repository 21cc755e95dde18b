"""simulate_format: what a model computes if its products read numbers of a narrow format."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax import _jax
from uscale_jax._jax import JaxprEqn
from uscale_jax._types import Apply
from uscale_jax.numerics._formats import Format, FormatLike, both_ways, quantized
from uscale_jax.trace import rebuilt
from uscale_jax.trace.replaced import Replaced

_PRODUCTS = ("dot_general", "conv_general_dilated", "ragged_dot_general")


def simulate_format(
    apply: Apply, fmt: FormatLike, *, backward: FormatLike | None = None
) -> Callable[..., Any]:
    r"""Returns ``apply`` with all that its products read rounded to a format.

    .. math::

       y = Q(x) \cdot Q(w), \qquad
       \frac{\partial L}{\partial x} = Q_b\Bigl(\frac{\partial L}{\partial y}\Bigr) \cdot Q(w)^T,
       \qquad
       \frac{\partial L}{\partial w} = Q(x)^T \cdot Q_b\Bigl(\frac{\partial L}{\partial y}\Bigr)

    for every matrix product and convolution of floating operands, with Q the rounding of
    :func:`quantized`: to the nearest number of the format, what is too large to the largest.
    Rounded are operands and cotangents, not sums and results, as in units that multiply narrow
    numbers and add in float32.  Nothing is scaled: this shows whether tensors fit the format as
    they are.  Dtypes stay, so any format can be tried on any device.

    Products are met wherever they are: in calls, ``scan``, ``while`` and ``cond``,
    ``jax.checkpoint`` (which still rematerialises) and ``shard_map``.  **Not looked into** are
    functions with derivative or batching rules of their own (``custom_vjp``, ``custom_jvp``,
    ``custom_vmap``): they run as they are, with those rules, and products inside them are left
    alone.  So are those of linear solvers (``jnp.linalg.solve``) and Pallas kernels, products of
    complex and integer operands, and operands of 8 bits and fewer.

    Take the gradient of what is returned.  Products that ``apply`` itself computes for a gradient
    are met like any other, their cotangents in the forward format.

    Args:
      apply: a pure function of any pytrees.  Arrays in them are traced; Python numbers, strings and
        other objects are passed on as they are.
      fmt: Q's format, a name (``"float8_e4m3fn"``), a dtype or a :class:`Format`.
      backward: Q_b's format: by default ``"float8_e5m2"`` for formats of 8 bits, else ``fmt``.

    Returns:
      A function of the same arguments and results.  Use it under ``jax.jit``: outside, equations
      run one by one.  It works under ``vmap`` and reverse-mode differentiation; not under
      forward-mode.

    Raises:
      ValueError: a format is not known.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> apply = lambda w, x: jax.nn.relu(x @ w)
      >>> simulated = jax.jit(us.simulate_format(apply, "float8_e4m3fn"))
      >>> x, w = jax.random.normal(jax.random.key(0), (2, 64, 64))
      >>> for std in (1.0, 0.01, 0.001):  # of the weights
      ...     exact, found = apply(std * w, x), simulated(std * w, x)
      ...     print(f"{jnp.std(found - exact) / jnp.std(exact):.2f}")
      0.04
      0.07
      0.63

    References:
      Micikevicius et al., *FP8 formats for deep learning*, 2022 (arXiv:2209.05433), Section 4, who
      simulate FP8 in the same way; which tensors of a Transformer need scales: Blake et al., *Unit
      scaling*, 2023 (arXiv:2303.11257).
    """
    forward, behind = both_ways(fmt, backward)

    @wraps(apply)
    def simulated(*args: Any, **kwargs: Any) -> Any:
        arrays, call = rebuilt.by_arrays(apply, args, kwargs)
        closed, outputs = _jax.closed_jaxpr(call, arrays)
        rounded = lambda eqn: _rounded(eqn, forward, behind)  # noqa: E731
        found = Replaced(closed, lambda eqn, _: bool(_sides(eqn)), rounded).run(arrays)
        return jax.tree.unflatten(jax.tree.structure(outputs), found)

    return simulated


def _sides(eqn: JaxprEqn) -> list[int]:
    """Which operands of an equation are rounded."""
    if _jax.primitive_name(eqn) not in _PRODUCTS:
        return []
    avals: list[Any] = [v.aval for v in eqn.invars[:2]]
    dtypes = [aval.dtype for aval in avals]
    if not all(jnp.issubdtype(dtype, jnp.floating) for dtype in dtypes):
        return []
    return [i for i, dtype in enumerate(dtypes) if jnp.finfo(dtype).bits > 8]


def _rounded(eqn: JaxprEqn, forward: Format, backward: Format) -> Callable[..., Any]:
    """The product of an equation as a function of its operands."""
    sides = _sides(eqn)
    plain = lambda *operands: _jax.bound(eqn, operands)[0]  # noqa: E731

    @jax.custom_vjp
    def product(*operands: Any) -> Any:
        return run(*operands)[0]

    def run(*operands: Any) -> tuple[Any, list[Any]]:
        read = [quantized(x, forward) if i in sides else x for i, x in enumerate(operands)]
        return plain(*read), read

    def back(read: Sequence[Any], g: Any) -> tuple[Any, ...]:
        return jax.vjp(plain, *read)[1](quantized(g, backward))

    product.defvjp(run, back)
    return product
