"""Which leaves of a layer must be zero for it to give out what it takes in.

The program of the layer decides, not names: with some leaves zero, every value is followed from
the streams before the layer to those behind it.  Where they arrive, the layer is the identity.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from uscale_jax._jax import JaxprEqn
from uscale_jax.trace.flat import line, variables
from uscale_jax.trace.zeros import ZERO, State, States, Stream, follow, state


@dataclass(frozen=True)
class Step:
    """What a layer computes from the streams before it to those behind it."""

    eqns: Sequence[JaxprEqn]
    enter: Sequence[Any]
    leave: Sequence[Any]
    nonnegative: Collection[Any] = ()
    """Those of ``enter`` that are known to be at least 0."""
    slices: Mapping[Any, Any] = field(default_factory=dict)
    """Variables of a loop's body that stand for a slice of a variable outside."""

    def run(self, zero: Collection[Any]) -> States:
        """Return what is known of every value where some leaves are zero."""
        states: States = dict.fromkeys(zero, ZERO)
        for i, v in enumerate(self.enter):
            states[v] = Stream(i, v.aval.dtype, v in self.nonnegative)
        follow(self.eqns, states, self.slices)
        return states

    def passes(self, states: Mapping[Any, State]) -> bool:
        """Return whether the streams arrive at the end."""
        return all(
            _is_stream(state(states, after), i) and _same_type(before, after)
            for i, (before, after) in enumerate(zip(self.enter, self.leave, strict=True))
        )

    def loss(self, states: Mapping[Any, State]) -> str:
        """Return where the streams are lost, which is the last place that reads one."""
        for eqn in reversed(self.eqns):
            read = [state(states, v) for v in eqn.invars]
            given = [states.get(v) for v in eqn.outvars]
            if any(isinstance(s, Stream) and s not in given for s in read):
                return line(eqn)
        return "no line of it, for it does not read what it takes in"

    def in_order(self, leaves: Collection[Any]) -> list[Any]:
        """Return the leaves that are used, in the order in which they meet other values."""
        read = {self.slices.get(v, v) for eqn in self.eqns for v in variables(eqn.invars)}
        meetings = {leaf: self._meeting(leaf) for leaf in leaves if leaf in read}
        return sorted(meetings, key=meetings.__getitem__)

    def _meeting(self, leaf: Any) -> int:
        """Return where a leaf first meets what is not computed from it alone.

        A leaf that is cast or laid out anew is not used yet: whole trees are, before any layer.
        """
        found, last = {leaf}, -1
        for place, eqn in enumerate(self.eqns):
            read = {self.slices.get(v, v) for v in variables(eqn.invars)}
            if read & found:
                last = place
                if not read <= found:
                    break
                found.update(eqn.outvars)
        return last


def silence(steps: Sequence[Step], leaves: Collection[Any]) -> tuple[list[Any], str]:
    """Returns leaves that make every step the identity by being zero, none of them needlessly.

    Those that come last are zero: an output kernel rather than what its input is computed with,
    so that nothing but it has to move before gradients reach the rest.  The text says where
    streams are lost even if all leaves are zero; it is empty if the steps can be the identity.
    """
    for step in steps:
        states = step.run(leaves)
        if not step.passes(states):
            return [], step.loss(states)
    order = list(dict.fromkeys(leaf for step in steps for leaf in step.in_order(leaves)))
    zero = order
    for leaf in order:
        fewer = [other for other in zero if other is not leaf]
        if all(step.passes(step.run(fewer)) for step in steps):
            zero = fewer
    return zero, ""


def _is_stream(found: State, place: int) -> bool:
    return isinstance(found, Stream) and found.place == place


def _same_type(a: Any, b: Any) -> bool:
    return bool(a.aval.shape == b.aval.shape and a.aval.dtype == b.aval.dtype)
