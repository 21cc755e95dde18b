"""Runs a jaxpr with something of its own going in and coming out at chosen equations.

Equations are counted as :mod:`uscale_jax.trace.inline` counts them, so that an equation is known by
its visit.  What goes in at an equation inside a ``scan`` is sliced over its turns, what comes out
is stacked; shards of a ``shard_map`` are turns too.  Gradients flow through both.  Functions with
rules of their own (``custom_vjp`` and others) are one equation, whose programs are not entered.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from uscale_jax.trace import rebuilt
from uscale_jax.trace.tapped import Sizes, bodies

Given: TypeAlias = Mapping[int, jax.Array]
"""What goes in, by visit: an array whose first dimensions are those of ``Spot.turns``."""

Out: TypeAlias = dict[int, jax.Array]
"""What comes out, by visit; its first dimensions are the same."""

At: TypeAlias = "Callable[[int, Sequence[Any], jax.Array | None], tuple[list[Any], jax.Array]]"
"""From a visit, what its equation returned and what goes in (None where nothing does): what is
returned in place of the former, and what comes out."""

Merge: TypeAlias = Callable[[jax.Array, jax.Array], jax.Array]
"""Of what comes out in two turns of a ``while`` loop, one."""


class Woven:
    """Runs programs; ``base`` is always the visit of the first equation."""

    def __init__(self, visits: Collection[int], at: At, merge: Merge) -> None:
        """Keep where something comes out (and may go in), and what is done there."""
        self.visits, self.at, self.merge = frozenset(visits), at, merge
        self.sizes = Sizes()

    def closed(
        self, closed: ClosedJaxpr, args: Sequence[Any], given: Given, base: int = 0
    ) -> tuple[list[Any], Out]:
        """Return what a program returns, and what comes out."""
        return self._jaxpr(closed.jaxpr, closed.consts, args, given, base)

    def _jaxpr(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        env: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )
        read = lambda atoms: [v.val if isinstance(v, Literal) else env[v] for v in atoms]  # noqa: E731
        out: Out = {}
        for eqn in jaxpr.eqns:
            results, inner = self._equation(eqn, read(eqn.invars), given, base)
            out.update(inner)
            env.update(zip(eqn.outvars, results, strict=True))
            base += 1 + sum(map(self.sizes.of, bodies(eqn)))
        return read(jaxpr.outvars), out

    def _body(
        self, body: Any, args: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        if isinstance(body, ClosedJaxpr):
            return self.closed(body, args, given, base)
        return self._jaxpr(body, (), args, given, base)

    def _equation(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        if base in self.visits:
            results, out = self.at(base, _jax.bound(eqn, values), given.get(base))
            return results, {base: out}
        last = base + sum(map(self.sizes.of, bodies(eqn)))
        if not any(base < visit <= last for visit in self.visits):
            return _jax.bound(eqn, values), {}
        inside = {visit: x for visit, x in given.items() if base < visit <= last}
        how = _ENTERED.get(_jax.primitive_name(eqn), Woven._called)
        with _jax.as_made(eqn):
            return how(self, eqn, values, inside, base)

    def _called(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        return self._body(bodies(eqn)[0], values, given, base + 1)

    def _rematerialised(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        run = lambda given, *args: self._called(eqn, args, given, base)  # noqa: E731
        return rebuilt.rematerialised(eqn, run)(given, *values)

    def _sharded(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        axes = (*sorted(_jax.manual_axes(eqn.params)),)
        over = PartitionSpec(axes)

        def run(*args: Any) -> tuple[Any, ...]:
            *operands, own = args
            results, out = self._called(
                eqn, operands, {visit: x[0] for visit, x in own.items()}, base
            )
            return (*results, {visit: _jax.spread(x, axes)[None] for visit, x in out.items()})

        *results, out = rebuilt.sharded(eqn, run, (over,), (over,))(*values, given)
        return results, out

    def _scan(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        params = eqn.params
        n, c = _jax.scan_counts(params)
        consts, init, xs = values[:n], [*values[n : n + c]], [*values[n + c :]]

        def step(state: Sequence[Any], turn: Any) -> tuple[list[Any], Any]:
            x, own = turn
            outs, out = self._called(eqn, [*consts, *state, *x], own, base)
            return outs[:c], (outs[c:], out)

        settings = {key: params[key] for key in ("length", "reverse", "unroll")}
        state, (ys, out) = jax.lax.scan(step, init, (xs, given), **settings)
        return [*state, *ys], out

    def _while(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        """A loop; its condition is run as it is."""
        condition, body = bodies(eqn)
        m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = base + 1 + self.sizes.of(condition)

        def turn(state: Sequence[Any]) -> tuple[list[Any], Out]:
            return self.closed(body, [*values[m : m + n], *state], {}, first)

        def step(carry: Any) -> Any:
            outs, out = turn(carry[0])
            return outs, {visit: self.merge(carry[1][visit], x) for visit, x in out.items()}

        init = [*values[m + n :]]
        empty = _zeros(jax.eval_shape(turn, init)[1])
        going = lambda carry: _jax.evaluate(condition, *values[:m], *carry[0])[0]  # noqa: E731
        return jax.lax.while_loop(going, step, (init, empty))

    def _cond(
        self, eqn: JaxprEqn, values: Sequence[Any], given: Given, base: int
    ) -> tuple[list[Any], Out]:
        """Branches; of those that are not taken zeros come out."""
        starts = [base + 1]
        for body in bodies(eqn):
            starts.append(starts[-1] + self.sizes.of(body))
        cases = [
            lambda given, *args, b=body, s=start: self._body(b, args, given, s)
            for body, start in zip(bodies(eqn), starts, strict=False)
        ]
        shapes: Out = {}
        for case in cases:
            shapes |= jax.eval_shape(case, given, *values[1:])[1]

        def full(case: Callable[..., Any]) -> Callable[..., Any]:
            def run(*args: Any) -> tuple[list[Any], Out]:
                outs, out = case(*args)
                return outs, {**_zeros(shapes), **out}

            return run

        return jax.lax.switch(values[0], [*map(full, cases)], given, *values[1:])


_ENTERED: dict[str, Callable[..., tuple[list[Any], Out]]] = {
    **dict.fromkeys(rebuilt.REMATERIALISED, Woven._rematerialised),
    rebuilt.SHARDED: Woven._sharded,
    "cond": Woven._cond,
    "scan": Woven._scan,
    "while": Woven._while,
}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
