"""Runs a program whose values are held in units: loops, branches and calls around the rules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax

from uscale_jax import _jax, _unit_rules
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from uscale_jax._unit_rules import Held, held, moved
from uscale_jax._unit_units import Unit, Units
from uscale_jax.trace import rebuilt
from uscale_jax.trace.tapped import Sizes, bodies


class UnitProgram:
    """Runs programs; ``base`` is always the visit of the first equation.

    Units are numbers that are known while tracing: arrays alone go through loops and branches.
    """

    def __init__(self, units: Units) -> None:
        """Keep the units of results."""
        self.units = units
        self.sizes = Sizes()

    def closed(self, closed: ClosedJaxpr, args: Sequence[Held], base: int = 0) -> list[Held]:
        """Return what a program returns."""
        return self._jaxpr(closed.jaxpr, [*map(held, closed.consts), *args], base)

    def _jaxpr(self, jaxpr: Jaxpr, args: Sequence[Held], base: int) -> list[Held]:
        env: dict[Any, Held] = dict(zip([*jaxpr.constvars, *jaxpr.invars], args, strict=True))

        def read(atoms: Sequence[Any]) -> list[Held]:
            return [held(v.val) if isinstance(v, Literal) else env[v] for v in atoms]

        for eqn in jaxpr.eqns:
            found = self._equation(eqn, read(eqn.invars), base)
            env.update(zip(eqn.outvars, found, strict=True))
            base += 1 + sum(map(self.sizes.of, bodies(eqn)))
        return read(jaxpr.outvars)

    def _body(self, body: Any, args: Sequence[Held], base: int) -> list[Held]:
        if isinstance(body, ClosedJaxpr):
            return self.closed(body, args, base)
        return self._jaxpr(body, args, base)

    def _equation(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        name = _jax.primitive_name(eqn)
        with _jax.as_made(eqn):
            if name in _ENTERED:
                return _ENTERED[name](self, eqn, operands, base)
            if name in _jax.CALLS and rebuilt.is_entered(eqn):
                return self._body(bodies(eqn)[0], operands, base + 1)
            return _unit_rules.results(eqn, operands, self.units, base)

    def _rematerialised(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        run = _Apart(lambda args: self._body(bodies(eqn)[0], args, base + 1), operands)
        return run.held(rebuilt.rematerialised(eqn, run)(*run.arrays))

    def _sharded(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        run = _Apart(lambda args: self._body(bodies(eqn)[0], args, base + 1), operands)
        return run.held(rebuilt.sharded(eqn, run)(*run.arrays))

    def _scan(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        """What is carried has one unit, that of what the body returns."""
        params = eqn.params
        n, c = _jax.scan_counts(params)
        turn = lambda args: self.closed(params["jaxpr"], args, base + 1)  # noqa: E731
        consts, init, xs = operands[:n], operands[n : n + c], operands[n + c :]
        rows = [Held(_first(h.x), h.unit) for h in xs]
        carried = _Apart(turn, [*consts, *init, *rows]).units()[:c]
        start = [moved(h, unit) for h, unit in zip(init, carried, strict=True)]
        inner = _Apart(turn, [*consts, *start, *rows])

        def step(state: Sequence[Any], x: Sequence[Any]) -> tuple[list[Any], list[Any]]:
            outs = inner.outcome([*(h.x for h in consts), *state, *x])
            after = [moved(h, unit) for h, unit in zip(outs[:c], carried, strict=True)]
            return [h.x for h in after], [h.x for h in outs[c:]]

        settings = {key: params[key] for key in ("length", "reverse", "unroll")}
        state, ys = jax.lax.scan(step, [h.x for h in start], [h.x for h in xs], **settings)
        kinds = inner.found[c:]
        return [*map(Held, state, carried), *map(Held, ys, kinds)]

    def _cond(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        """Results have the units of the first branch that gives them one with a gradient."""
        which, *given = operands
        cases, base = [], base + 1
        for body in bodies(eqn):
            cases.append(_Apart(partial(self._body, body, base=base), given))
            base += self.sizes.of(body)
        common = [*map(_common, zip(*(case.units() for case in cases), strict=True))]

        def branch(case: _Apart) -> Callable[..., list[Any]]:
            def run(*arrays: Any) -> list[Any]:
                outs = case.outcome(arrays)
                return [moved(h, unit).x for h, unit in zip(outs, common, strict=True)]

            return run

        outs = jax.lax.switch(which.x, [*map(branch, cases)], *(h.x for h in given))
        return [*map(Held, outs, common)]

    def _while(self, eqn: JaxprEqn, operands: Sequence[Held], base: int) -> list[Held]:
        """Loops without gradients compute on values as they are."""
        del base
        outs = _jax.rebound(eqn, [_unit_rules.leaving(h) for h in operands])
        return [*map(held, outs)]


_ENTERED: dict[str, Callable[..., list[Held]]] = {
    **dict.fromkeys(rebuilt.REMATERIALISED, UnitProgram._rematerialised),
    rebuilt.SHARDED: UnitProgram._sharded,
    "cond": UnitProgram._cond,
    "scan": UnitProgram._scan,
    "while": UnitProgram._while,
}


class _Apart:
    """A function of held values as one of arrays: units stay outside, and come out aside."""

    def __init__(self, run: Callable[[Sequence[Held]], list[Held]], operands: Sequence[Held]):
        self.run, self.kinds = run, [h.unit for h in operands]
        self.arrays = [h.x for h in operands]
        self.found: list[Unit | None] = []

    def outcome(self, arrays: Sequence[Any]) -> list[Held]:
        outs = self.run([*map(Held, arrays, self.kinds)])
        self.found = [h.unit for h in outs]
        return outs

    def __call__(self, *arrays: Any) -> tuple[Any, ...]:
        return (*(h.x for h in self.outcome(arrays)),)

    def units(self) -> list[Unit | None]:
        """Of the results, by tracing."""
        jax.eval_shape(self, *self.arrays)
        return self.found

    def held(self, outs: Sequence[Any]) -> list[Held]:
        return [*map(Held, outs, self.found)]


def _common(units: Sequence[Unit | None]) -> Unit | None:
    return next((unit for unit in units if unit and unit.slope is not None), units[0])


def _first(x: Any) -> Any:
    return jax.eval_shape(lambda x: x[0], x)
