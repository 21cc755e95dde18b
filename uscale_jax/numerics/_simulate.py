"""simulate_format: what a model computes if its products read numbers of a narrow format."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import jax
import jax.numpy as jnp

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn
from uscale_jax._types import Apply
from uscale_jax.numerics._formats import Format, FormatLike, both_ways, quantized
from uscale_jax.trace import rebuilt
from uscale_jax.trace.tapped import Runner, Taken, bodies

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
        found, _ = _Simulated(closed, forward, behind).closed(closed, arrays, 0)
        return jax.tree.unflatten(jax.tree.structure(outputs), found)

    return simulated


class _Simulated(Runner):
    """Takes nothing; goes wherever a product is, and rounds what it reads."""

    def __init__(self, closed: ClosedJaxpr, forward: Format, backward: Format) -> None:
        super().__init__(taps={}, results={}, stacked=frozenset())
        self.forward, self.backward = forward, backward
        self.visits = {*self._products(closed.jaxpr, 0)}

    def _products(self, jaxpr: Jaxpr, base: int) -> Iterator[int]:
        """Yields the visit of every product that can be reached."""
        for eqn in jaxpr.eqns:
            if _sides(eqn):
                yield base
            base += 1
            for body in bodies(eqn):
                if rebuilt.is_entered(eqn):
                    inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                    yield from self._products(inner, base)
                base += self._size(body)

    def _equation(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        if base in self.visits:
            return [_rounded(eqn, self.forward, self.backward)(*values)], {}
        inside = range(base + 1, base + 1 + sum(map(self._size, bodies(eqn))))
        again = _REBUILT.get(_jax.primitive_name(eqn))
        if again is None or self.visits.isdisjoint(inside):
            return super()._equation(eqn, values, base)
        return again(self, eqn, values, base), {}

    def rematerialised(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        return rebuilt.rematerialised(eqn, self._inside(eqn, base))(*values)

    def sharded(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        run = self._inside(eqn, base)
        return [*rebuilt.sharded(eqn, lambda *args: tuple(run(*args)))(*values)]

    def _inside(self, eqn: JaxprEqn, base: int) -> Callable[..., list[Any]]:
        [body] = bodies(eqn)
        return lambda *args: self._body(body, args, base + 1)[0]

    def looped(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        """A ``while`` loop, whose condition may hold products too."""
        condition, body = bodies(eqn)
        m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = base + 1 + self._size(condition)

        def going(state: Sequence[Any]) -> Any:
            return self.closed(condition, [*values[:m], *state], base + 1)[0][0]

        def turn(state: Sequence[Any]) -> list[Any]:
            return self.closed(body, [*values[m : m + n], *state], first)[0]

        return jax.lax.while_loop(going, turn, [*values[m + n :]])


_REBUILT: dict[str, Callable[[_Simulated, JaxprEqn, Sequence[Any], int], list[Any]]] = {
    **dict.fromkeys(rebuilt.REMATERIALISED, _Simulated.rematerialised),
    rebuilt.SHARDED: _Simulated.sharded,
    "while": _Simulated.looped,
}
"""What the base class would inline, run as it is, or run in part."""


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
