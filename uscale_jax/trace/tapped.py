"""Runs a jaxpr and takes something at chosen equations, inside calls, loops and branches too.

Equations are counted as :mod:`uscale_jax.trace.inline` counts them: each that is met, and then
those of the programs it calls, loops over or branches to.  So what an analysis finds in the flat
program can be looked at while the user's program runs, unchanged.

What is taken inside a loop is added up over its turns, except in scans through the layers of a
leaf: there it is stacked, for every layer has weights of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal

Tap: TypeAlias = Callable[[Sequence[Any]], Any]
"""What to take at an equation, from its operands: a pytree of arrays that can be added up.

Those of ``results`` are given what the equation returns instead."""

Taken: TypeAlias = dict[int, Any]
"""What was taken, by visit."""


def run(
    closed: ClosedJaxpr,
    taps: Mapping[int, Tap],
    args: Sequence[Any],
    stacked: Collection[tuple[int, int]] = (),
    results: Mapping[int, Tap] | None = None,
) -> tuple[list[Any], Taken]:
    """Returns the outputs of a program on ``args``, and what was taken.

    ``stacked`` are pairs of a tap and a scan, by visits: over its turns this tap is not added up.
    ``results`` are taps of what equations return, at visits that have no other tap.
    Taps within primitives that are run as they are (``shard_map``, solvers), and in the conditions
    of ``while`` loops, take nothing.
    """
    return Runner(taps, results or {}, frozenset(stacked)).closed(closed, args, 0)


def scans(closed: ClosedJaxpr) -> dict[int, tuple[int, ...]]:
    """Returns the scans that every equation is in, outermost first, by visits.

    What is in ``while`` loops, or is run as it is, is left out.
    """
    return dict(Runner({}, {}, frozenset()).walk(closed.jaxpr, 0, ()))


class Sizes:
    """How many equations are met in programs, those of inner programs too."""

    def __init__(self) -> None:
        """Know of none yet."""
        self.known: dict[int, tuple[Any, int]] = {}

    def of(self, body: Any) -> int:
        """Return the number for a program, closed or not."""
        jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        if id(jaxpr) not in self.known:
            count = sum(1 + sum(map(self.of, bodies(eqn))) for eqn in jaxpr.eqns)
            self.known[id(jaxpr)] = (jaxpr, count)  # the jaxpr, so that its id stays its own
        return self.known[id(jaxpr)][1]


class Runner:
    """Runs programs; ``base`` is always the visit of the first equation."""

    def __init__(
        self,
        taps: Mapping[int, Tap],
        results: Mapping[int, Tap],
        stacked: frozenset[tuple[int, int]],
    ) -> None:
        """Keep what to take, and where."""
        self.taps, self.results, self.stacked = taps, results, stacked
        self.visits = {*taps, *results}
        self._size = Sizes().of

    def closed(
        self, closed: ClosedJaxpr, args: Sequence[Any], base: int
    ) -> tuple[list[Any], Taken]:
        """Return what a program returns, and what was taken."""
        return self.jaxpr(closed.jaxpr, closed.consts, args, base)

    def jaxpr(
        self, jaxpr: Jaxpr, consts: Sequence[Any], args: Sequence[Any], base: int
    ) -> tuple[list[Any], Taken]:
        """Return the same of a program without its constants."""
        env: dict[Any, Any] = dict(
            zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True)
        )
        read = lambda atoms: [v.val if isinstance(v, Literal) else env[v] for v in atoms]  # noqa: E731
        taken: Taken = {}
        for eqn in jaxpr.eqns:
            values = read(eqn.invars)
            if base in self.taps:
                taken[base] = self.taps[base](values)
            outs, inner = self._equation(eqn, values, base)
            taken.update(inner)
            if base in self.results:
                taken[base] = self.results[base](outs)
            env.update(zip(eqn.outvars, outs, strict=True))
            base += 1 + sum(map(self._size, bodies(eqn)))
        return read(jaxpr.outvars), taken

    def _equation(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        inner = bodies(eqn)
        inside = range(base + 1, base + 1 + sum(map(self._size, inner)))
        if any(visit in inside for visit in self.visits):
            name = _jax.primitive_name(eqn)
            with _jax.as_made(eqn):
                if name in _jax.CALLS:
                    return self._body(inner[0], values, base + 1)
                if name in _LOOPS:
                    return _LOOPS[name](self, eqn, values, base)
        return _jax.bound(eqn, values), {}

    def _body(self, body: Any, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        if isinstance(body, ClosedJaxpr):
            return self.closed(body, values, base)
        return self.jaxpr(body, (), values, base)

    def walk(
        self, jaxpr: Jaxpr, base: int, inside: tuple[int, ...]
    ) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Yields every visit with the scans around it."""
        for eqn in jaxpr.eqns:
            yield base, inside
            name = _jax.primitive_name(eqn)
            around = (*inside, base) if name == "scan" else inside
            base += 1
            for body in bodies(eqn):
                if name in _jax.CALLS or name in ("cond", "scan"):
                    inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                    yield from self.walk(inner, base, around)
                base += self._size(body)

    def scan(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        """Return the same of a scan, what is taken added up or stacked."""
        params = eqn.params
        n, c = _jax.scan_counts(params)
        consts, init, xs = values[:n], values[n : n + c], values[n + c :]

        def turn(state: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], Taken, Taken]:
            outs, taken = self.closed(params["jaxpr"], [*consts, *state, *x], base + 1)
            each = {v: taken.pop(v) for v in [*taken] if (v, base) in self.stacked}
            return outs, taken, each

        def step(carry: Any, x: Any) -> tuple[Any, Any]:
            state, total = carry
            outs, taken, each = turn(state, x)
            return (outs[:c], _added(total, taken)), (outs[c:], each)

        first = [jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for x in xs]
        zeros = _zeros(jax.eval_shape(turn, list(init), first)[1])
        (state, total), (ys, each) = jax.lax.scan(
            step,
            (list(init), zeros),
            list(xs),
            length=params["length"],
            reverse=params["reverse"],
            unroll=params["unroll"],
        )
        return [*state, *ys], {**total, **each}

    def while_loop(
        self, eqn: JaxprEqn, values: Sequence[Any], base: int
    ) -> tuple[list[Any], Taken]:
        """Return the same of a loop, what is taken in its body added up."""
        condition, body = bodies(eqn)
        m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = base + 1 + self._size(condition)

        def turn(state: Sequence[Any]) -> tuple[list[Any], Taken]:
            return self.closed(body, [*values[m : m + n], *state], first)

        def step(carry: Any) -> Any:
            outs, taken = turn(carry[0])
            return outs, _added(carry[1], taken)

        def going(carry: Any) -> Any:
            return _jax.evaluate(condition, *values[:m], *carry[0])[0]

        init = list(values[m + n :])
        return jax.lax.while_loop(going, step, (init, _zeros(jax.eval_shape(turn, init)[1])))

    def cond(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        """Return the same of the branch that is taken."""
        cases, base = [], base + 1
        for body in bodies(eqn):
            cases.append((body, base))
            base += self._size(body)
        shapes: Taken = {}
        for body, start in cases:
            shapes |= jax.eval_shape(lambda *a, b=body, s=start: self.closed(b, a, s), *values[1:])[
                1
            ]

        def branch(body: ClosedJaxpr, start: int) -> Callable[..., Any]:
            def case(*args: Any) -> tuple[list[Any], Taken]:
                outs, taken = self.closed(body, args, start)
                return outs, {**_zeros(shapes), **taken}

            return case

        return jax.lax.switch(values[0], [branch(*case) for case in cases], *values[1:])


_LOOPS: dict[str, Callable[[Runner, JaxprEqn, Sequence[Any], int], tuple[list[Any], Taken]]] = {
    "cond": Runner.cond,
    "scan": Runner.scan,
    "while": Runner.while_loop,
}


def bodies(eqn: JaxprEqn) -> list[Any]:
    """Returns the programs that the flat program enters at an equation, in its order."""
    name = _jax.primitive_name(eqn)
    if name in _jax.CALLS:
        return [_jax.called_program(name, eqn.params)]
    return _CONTROLLED[name](eqn.params) if name in _CONTROLLED else []


_CONTROLLED: dict[str, Callable[[Mapping[str, Any]], list[Any]]] = {
    "cond": lambda params: [*params["branches"]],
    "custom_linear_solve": lambda params: [params["jaxprs"].solve],
    "scan": lambda params: [params["jaxpr"]],
    "shard_map": lambda params: [params["jaxpr"]],
    "while": lambda params: [params["cond_jaxpr"], params["body_jaxpr"]],
}


def _zeros(shapes: Any) -> Any:
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _added(total: Taken, taken: Taken) -> Taken:
    return jax.tree.map(jnp.add, total, taken)
