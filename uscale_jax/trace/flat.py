"""Jaxprs without calls: what ``jit``, ``remat`` and the like call stands in their place.

A program of layers can only be cut between them where their equations are in one list.  The lines
that equations come from are kept as :mod:`uscale_jax.trace.source` finds them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from uscale_jax.trace.source import Source


def flattened(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Returns the program with its calls inlined and without what its outputs do not need.

    Calls within loops and branches stay.  The inputs are the same variables.
    """
    flat = _Inliner()
    env = {v: v for v in closed.jaxpr.invars}
    outvars = flat.closed(closed, env, None)
    return live(_jax.with_equations(closed, flat.eqns, flat.consts, outvars=outvars))


def live(closed: ClosedJaxpr) -> ClosedJaxpr:
    """Returns the program without equations and constants that its outputs do not depend on."""
    needed = set(variables(closed.jaxpr.outvars))
    kept = []
    for eqn in reversed(closed.jaxpr.eqns):
        if not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(variables(eqn.invars))
    pairs = zip(closed.jaxpr.constvars, closed.consts, strict=True)
    consts = {v: array for v, array in pairs if v in needed}
    return _jax.with_equations(closed, kept[::-1], consts)


def substituted(closed: ClosedJaxpr, values: Mapping[Any, Any]) -> ClosedJaxpr:
    """Returns the program in which whoever reads a variable reads ``values[variable]``."""
    read = lambda atoms: [v if isinstance(v, Literal) else values.get(v, v) for v in atoms]  # noqa: E731
    eqns = [_jax.rebuilt(eqn, invars=read(eqn.invars)) for eqn in closed.jaxpr.eqns]
    return live(_jax.with_equations(closed, eqns, constants(closed), outvars=read(closed.outvars)))


def constants(closed: ClosedJaxpr) -> dict[Any, Any]:
    """Returns the constants of a program by variable."""
    return dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))


def variables(atoms: Sequence[Any]) -> list[Any]:
    """Returns the operands that are no literals."""
    return [v for v in atoms if not isinstance(v, Literal)]


def aval(v: Any) -> Any:
    """Returns the type of an operand or a result."""
    return v.aval


def line(eqn: JaxprEqn) -> str:
    """Returns what an equation does and where it comes from: ```mul` at model.py:31``."""
    return f"`{_jax.primitive_name(eqn)}` at {Source(eqn.source_info)}"


def used(closed: ClosedJaxpr) -> set[Any]:
    """Returns the variables that the program reads."""
    lists = [closed.jaxpr.outvars, *(eqn.invars for eqn in closed.jaxpr.eqns)]
    return {v for atoms in lists for v in variables(atoms)}


class _Inliner:
    """Collects the equations of a program and of those that it calls."""

    def __init__(self) -> None:
        self.eqns: list[JaxprEqn] = []
        self.consts: dict[Any, Any] = {}
        self.known: dict[int, Any] = {}

    def closed(self, closed: ClosedJaxpr, env: dict[Any, Any], info: Any) -> list[Any]:
        """Inlines a program with constants, its inputs being in ``env``; returns its outputs."""
        for variable, array in constants(closed).items():
            if id(array) not in self.known:
                self.known[id(array)] = _jax.new_variable(variable.aval)
                self.consts[self.known[id(array)]] = array
            env[variable] = self.known[id(array)]
        return self.jaxpr(closed.jaxpr, env, info)

    def jaxpr(self, jaxpr: Jaxpr, env: dict[Any, Any], info: Any) -> list[Any]:
        """Inlines a program, every equation with the lines of ``info`` if there is one."""
        read = lambda atoms: [v if isinstance(v, Literal) else env[v] for v in atoms]  # noqa: E731
        for eqn in jaxpr.eqns:
            args = read(eqn.invars)
            if _jax.primitive_name(eqn) in _jax.CALLS:
                outs = self._call(eqn, args, info)
            else:
                outs = [_jax.new_variable(v.aval) for v in eqn.outvars]
                where = eqn.source_info if info is None else info
                parts = {"invars": args, "outvars": outs, "source_info": where}
                self.eqns.append(_jax.rebuilt(eqn, **parts))
            env.update(zip(eqn.outvars, outs, strict=True))
        return read(jaxpr.outvars)

    def _call(self, eqn: JaxprEqn, args: Sequence[Any], info: Any) -> list[Any]:
        body = _jax.called_program(_jax.primitive_name(eqn), eqn.params)
        jaxpr = body.jaxpr if isinstance(body, ClosedJaxpr) else body
        env = dict(zip(jaxpr.invars, args, strict=True))
        info = _callers_lines(eqn, jaxpr) if info is None else info
        if isinstance(body, ClosedJaxpr):
            return self.closed(body, env, info)
        return self.jaxpr(body, env, info)


def _callers_lines(eqn: JaxprEqn, body: Jaxpr) -> Any:
    """Returns the lines to give to what is called; None where its own say more.

    JAX's own jitted helpers are traced once, and have the lines of their first call.
    """
    if not body.eqns:
        return None
    named = eqn.primitive.name in ("jit", "pjit")
    called = eqn.params.get("name") if named else None
    caller = Source(eqn.source_info)
    found = str(Source(body.eqns[0].source_info, caller, called))
    return eqn.source_info if found == str(caller) else None
