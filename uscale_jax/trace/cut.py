"""Where one layer ends and the next begins, and a program with some of its layers cut out.

Nothing here goes by names.  What depends on the leaves of layer ``k`` belongs to it or comes
after it; what comes from before and is read there is what layer ``k`` takes in: its *streams*,
one for a residual network.  To cut layers out is to let who reads the streams behind them read
those before them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from uscale_jax._jax import ClosedJaxpr, JaxprEqn, primitive_name
from uscale_jax.trace.flat import line, substituted, variables

Streams: TypeAlias = tuple[Any, ...]

_ADVICE = (
    "Expected: layers in a chain, each taking in what the one before gives out. Fix: number only "
    "what is applied one after the other, or grow in width only."
)


@dataclass(frozen=True)
class Chain:
    """What flows between the layers of a family."""

    family: str
    eqns: Sequence[JaxprEqn]
    streams: dict[int, Streams]
    """What layer ``k`` takes in, for all layers but the first, and behind the last."""

    def between(self, layer: int) -> list[JaxprEqn]:
        """Return the equations from the streams before a layer to those behind it."""
        needed, enter = {*self.streams[layer + 1]}, {*self.streams[layer]}
        kept = []
        for eqn in reversed(self.eqns):
            if not needed.isdisjoint(eqn.outvars) and enter.isdisjoint(eqn.outvars):
                kept.append(eqn)
                needed.update(v for v in variables(eqn.invars) if v not in enter)
        return kept[::-1]

    def producer(self, stream: Any) -> JaxprEqn | None:
        """Return the equation that a stream comes from."""
        return next((eqn for eqn in self.eqns if stream in eqn.outvars), None)


def chain(closed: ClosedJaxpr, layer_of: Mapping[Any, int], count: int, family: str) -> Chain:
    """Returns what flows between ``count`` layers, whose leaves are the keys of ``layer_of``.

    Raises:
      ValueError: they are not a chain.
    """
    view = _View(closed.jaxpr.eqns, layer_of, count, family)
    streams = {k: view.streams(k) for k in range(1, count)}
    _check_alike(streams, family)
    last, difference = view.end(streams)
    while not last:
        earlier = view.earlier(streams)
        if earlier is None:
            raise ValueError(
                f"layer {count - 1} of {family}, the last, is not computed as any layer before it, "
                f"so that its end is unknown: {difference}. {_ADVICE}"
            )
        streams, (last, _) = earlier, view.end(earlier)
    streams = {**streams, count: last}
    _check_alike(streams, family)
    return Chain(family, view.eqns, streams)


def without(closed: ClosedJaxpr, chain: Chain, layers: Sequence[int]) -> ClosedJaxpr:
    """Returns the program without some layers, never the first."""
    values: dict[Any, Any] = {}
    for k in sorted(layers):
        before = [values.get(v, v) for v in chain.streams[k]]
        values.update(zip(chain.streams[k + 1], before, strict=True))
    return substituted(closed, values)


def _check_alike(streams: Mapping[int, Streams], family: str) -> None:
    kinds = {k: [(v.aval.shape, v.aval.dtype) for v in vs] for k, vs in streams.items()}
    for k, kind in kinds.items():
        if kind != kinds[1]:
            raise ValueError(
                f"layer 1 of {family} takes in {_describe(streams[1])}, and what comes after "
                f"layer {k - 1} takes in {_describe(streams[k])}. {_ADVICE}"
            )


def _describe(streams: Streams) -> str:
    return ", ".join(str(v.aval.str_short()) for v in streams) or "nothing"


class _View:
    """Equations, and which layers each depends on: a bit a layer."""

    def __init__(
        self, eqns: Sequence[JaxprEqn], layer_of: Mapping[Any, int], count: int, family: str
    ) -> None:
        self.eqns, self.layer_of, self.count, self.family = eqns, layer_of, count, family
        self.masks = {v: 1 << layer for v, layer in layer_of.items()}
        self.producers = {v: eqn for eqn in eqns for v in eqn.outvars}
        self.crossing: dict[int, dict[Any, None]] = {k: {} for k in range(count)}
        """For every layer, what it reads of the layers before it."""
        alone = {**layer_of}  # what is computed from the leaves of one layer only
        for eqn in eqns:
            self._check_one_layer(eqn, alone)
            mask = self.mask(variables(eqn.invars))
            self.masks.update((v, mask) for v in eqn.outvars)
            self._note_crossings(eqn, mask)

    def _note_crossings(self, eqn: JaxprEqn, mask: int) -> None:
        for v in variables(eqn.invars):
            missing = mask & ~self.masks.get(v, mask)
            for k in range(missing.bit_length()):
                if missing >> k & 1 and self._before(v, k):
                    self.crossing[k][v] = None

    def mask(self, values: Sequence[Any]) -> int:
        """Return the layers that any of the values depends on."""
        found = 0
        for v in values:
            found |= self.masks.get(v, 0)
        return found

    def _check_one_layer(self, eqn: JaxprEqn, alone: dict[Any, int]) -> None:
        reads = variables(eqn.invars)
        layers = sorted({alone[v] for v in reads if v in alone})
        if len(layers) > 1:
            raise ValueError(
                f"leaves of layers {', '.join(map(str, layers))} of {self.family} meet in one "
                f"operation, {line(eqn)}. {_ADVICE}"
            )
        if reads and all(v in alone for v in reads):
            alone.update(dict.fromkeys(eqn.outvars, layers[0]))

    def streams(self, k: int) -> Streams:
        """Return what layer ``k`` takes in from the layers before it."""
        order = {v: place for place, v in enumerate(self.producers)}
        found = sorted(self.crossing[k], key=lambda v: order.get(v, -1))
        for v in reversed(found):
            rest = {u for u in found if u is not v}
            if self._computable(v, rest, k):
                found = [u for u in found if u is not v]
        if not found or any(v in self.layer_of for v in found):
            raise ValueError(
                f"layer {k} of {self.family} does not take in what layer {k - 1} gives out: it "
                f"reads {_describe(tuple(found))} of the layers before it. {_ADVICE}"
            )
        return tuple(found)

    def _before(self, v: Any, k: int) -> bool:
        mask = self.masks.get(v, 0)
        return bool(mask & (1 << k) - 1) and not mask >> k & 1

    def _computable(self, v: Any, rest: set[Any], k: int) -> bool:
        """Return whether other streams suffice for ``v``: it is the norm of one, say.

        It is then computed in layer ``k``, though it does not depend on the leaves there.
        """
        todo, seen = [v], {v}
        while todo:
            eqn = self.producers.get(todo.pop())
            if eqn is None:  # a leaf of a layer before
                return False
            reads = {u for u in variables(eqn.invars) if self._before(u, k)} - rest - seen
            seen |= reads
            todo += reads
        return True

    def own(self, k: int) -> list[JaxprEqn]:
        """Return what depends on layer ``k`` but on no later one."""
        return [eqn for eqn in self.eqns if self.mask(eqn.outvars) >> k == 1]

    def end(self, streams: Mapping[int, Streams]) -> tuple[Streams, str]:
        """Return what the last layer gives out, found by comparing it with those before it.

        The text says how it differs from the one before if it is like none of them.
        """
        last, failures = self.own(self.count - 1), []
        for k in range(self.count - 2, -1, -1):
            own = self.own(k)
            places = [self._place(own, v) for v in streams[k + 1]]
            length = 1 + max(place for place, _ in places)
            failures.append(_difference(own[:length], last[:length]))
            if not failures[-1]:
                return tuple(last[place].outvars[out] for place, out in places), ""
        return (), failures[0]

    def earlier(self, streams: Mapping[int, Streams]) -> dict[int, Streams] | None:
        """Return what streams are computed from without leaves; None if they are not.

        A layer that begins with a relu takes in what that reads, whereas only its result crosses.
        """
        found = {k: self._read_alone(stream, k) for k, (stream, *_) in streams.items()}
        alone = all(len(vs) == 1 for vs in streams.values())
        return None if not alone or None in found.values() else {k: (v,) for k, v in found.items()}

    def _read_alone(self, stream: Any, k: int) -> Any:
        """Return the one value of layers before ``k`` that a stream is computed from."""
        reads = {v for v in variables(self.producers[stream].invars) if self._before(v, k)}
        return None if len(reads) != 1 or reads & self.layer_of.keys() else reads.pop()

    def _place(self, eqns: Sequence[JaxprEqn], v: Any) -> tuple[int, int]:
        for place, eqn in enumerate(eqns):
            if v in eqn.outvars:
                return place, eqn.outvars.index(v)
        raise ValueError(
            f"what a layer of {self.family} gives out, {v.aval.str_short()}, does not depend on "
            f"its leaves. {_ADVICE}"
        )


def _difference(own: Sequence[JaxprEqn], last: Sequence[JaxprEqn]) -> str:
    """Returns how two lists of equations differ, empty if they are wired alike."""
    known: dict[Any, Any] = {}
    if len(last) < len(own):
        return f"it lacks {line(own[len(last)])}"
    for a, b in zip(own, last, strict=True):
        reads = [known[u] for u in variables(a.invars) if u in known]
        if primitive_name(a) != primitive_name(b) or any(v not in b.invars for v in reads):
            return f"{line(b)} where another has {line(a)}"
        known.update(zip(a.outvars, b.outvars, strict=True))
    return ""
