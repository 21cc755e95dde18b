"""Runs a jaxpr with chosen equations replaced: in calls, loops, checkpoints and shards too."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn
from uscale_jax.trace import rebuilt
from uscale_jax.trace.tapped import Runner, Taken, bodies


class Replaced(Runner):
    """Runs a program with other functions in place of some of its equations.

    It goes wherever those are, but not into functions with rules of their own.
    """

    def __init__(
        self,
        program: ClosedJaxpr,
        chosen: Callable[[JaxprEqn, int], bool],
        replacement: Callable[[JaxprEqn], Callable[..., Any]],
    ) -> None:
        """Choose equations, by what they and their visits are.

        ``replacement`` of one takes its operands and returns its one result.
        """
        super().__init__(taps={}, results={}, stacked=frozenset())
        self.program, self.chosen, self.replacement = program, chosen, replacement
        self.visits = {*self._found(program.jaxpr, 0)}

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Return what the program returns."""
        return self.closed(self.program, args, 0)[0]

    def _found(self, jaxpr: Jaxpr, base: int) -> Iterator[int]:
        """Yields the visits that can be reached."""
        for eqn in jaxpr.eqns:
            if self.chosen(eqn, base):
                yield base
            base += 1
            for body in bodies(eqn):
                if rebuilt.is_entered(eqn):
                    inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                    yield from self._found(inner, base)
                base += self._size(body)

    def _equation(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> tuple[list[Any], Taken]:
        if base in self.visits:
            with _jax.as_made(eqn):
                return [self.replacement(eqn)(*values)], {}
        inside = range(base + 1, base + 1 + sum(map(self._size, bodies(eqn))))
        again = _REBUILT.get(_jax.primitive_name(eqn))
        if again is None or self.visits.isdisjoint(inside):
            return super()._equation(eqn, values, base)
        with _jax.as_made(eqn):
            return again(self, eqn, values, base), {}

    def _rematerialised(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        return rebuilt.rematerialised(eqn, self._inside(eqn, base))(*values)

    def _sharded(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        run = self._inside(eqn, base)
        return [*rebuilt.sharded(eqn, lambda *args: tuple(run(*args)))(*values)]

    def _inside(self, eqn: JaxprEqn, base: int) -> Callable[..., list[Any]]:
        [body] = bodies(eqn)
        return lambda *args: self._body(body, args, base + 1)[0]

    def _looped(self, eqn: JaxprEqn, values: Sequence[Any], base: int) -> list[Any]:
        """A ``while`` loop, whose condition may hold products too."""
        condition, body = bodies(eqn)
        m, n = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        first = base + 1 + self._size(condition)

        def going(state: Sequence[Any]) -> Any:
            return self.closed(condition, [*values[:m], *state], base + 1)[0][0]

        def turn(state: Sequence[Any]) -> list[Any]:
            return self.closed(body, [*values[m : m + n], *state], first)[0]

        return jax.lax.while_loop(going, turn, [*values[m + n :]])


_REBUILT: dict[str, Callable[[Replaced, JaxprEqn, Sequence[Any], int], list[Any]]] = {
    **dict.fromkeys(rebuilt.REMATERIALISED, Replaced._rematerialised),
    rebuilt.SHARDED: Replaced._sharded,
    "while": Replaced._looped,
}
"""What the base class would inline, run as it is, or run in part."""
