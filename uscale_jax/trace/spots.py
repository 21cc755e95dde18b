"""The equations of a jaxpr that are bound as they are, where they stand and what they read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, Jaxpr, JaxprEqn, Literal
from uscale_jax.trace import rebuilt
from uscale_jax.trace.source import Source
from uscale_jax.trace.tapped import Sizes, bodies

Label: TypeAlias = int
"""Of a value: the one input that it is made from, or one of those below."""
CONSTANT, MIXED = -1, -2


class Spot(NamedTuple):
    """An equation that is not entered."""

    visit: int
    """As :mod:`uscale_jax.trace.inline` counts them."""
    eqn: JaxprEqn
    scope: str
    """The names of scopes around it, ``model/layer_0/up``; "" without any."""
    source: Source
    reads: tuple[Label, ...]
    """Of its operands."""
    turns: tuple[int, ...] = ()
    """How often it is met, in the scans and shard_maps around it."""
    whiles: bool = False
    """Whether it is in a ``while`` loop, whose turns are not told apart or differentiated."""

    @property
    def varies(self) -> bool:
        """Return whether inputs of the program have a part in it."""
        return any(label != CONSTANT for label in self.reads)


class _Around(NamedTuple):
    scope: str = ""
    source: Source | None = None
    called: str | None = None
    turns: tuple[int, ...] = ()
    whiles: bool = False


def spots(closed: ClosedJaxpr) -> list[Spot]:
    """Returns every equation that is met and not entered, in order."""
    sizes = Sizes()
    labels = {var: i for i, var in enumerate(closed.jaxpr.invars)}
    return [*_spots(closed.jaxpr, 0, labels, _Around(), sizes)]


def _spots(
    jaxpr: Jaxpr, visit: int, labels: dict[Any, Label], around: _Around, sizes: Sizes
) -> Iterator[Spot]:
    for eqn in jaxpr.eqns:
        reads = [_label(v, labels) for v in eqn.invars]
        source = Source(eqn.source_info, around.source, around.called)
        scope = "/".join(part for part in (around.scope, _scope(eqn)) if part)
        results = [_combined(reads)] * len(eqn.outvars)
        entered = rebuilt.is_entered(eqn)
        if not (entered and bodies(eqn)):
            yield Spot(visit, eqn, scope, source, (*reads,), around.turns, around.whiles)
        visit += 1
        for i, body in enumerate(bodies(eqn)):
            if entered and not _is_condition(eqn, i):
                inner = body.jaxpr if isinstance(body, ClosedJaxpr) else body
                own = dict(zip(inner.invars, _operands(eqn, reads, i), strict=True))
                yield from _spots(inner, visit, own, _inside(eqn, around, scope, source), sizes)
                results = [_label(v, own) for v in inner.outvars] if _calls(eqn) else results
            visit += sizes.of(body)
        labels.update(zip(eqn.outvars, results, strict=True))


def _scope(eqn: JaxprEqn) -> str:
    """The names of scopes, without those of transformations around them, ``vmap(up)``."""
    scopes, inside = "", _jax.scopes(eqn.source_info)
    while inside != scopes:
        scopes, inside = inside, _TRANSFORMED.sub(r"\1", inside)
    return "/".join(part for part in scopes.split("/") if part)


_TRANSFORMED = re.compile(r"\w+\(([^()]*)\)")


def _label(atom: Any, labels: Mapping[Any, Label]) -> Label:
    return CONSTANT if isinstance(atom, Literal) else labels.get(atom, CONSTANT)


def _combined(labels: Iterable[Label]) -> Label:
    """Of what is made from values: one input's where it alone has a part in them."""
    found = {label for label in labels if label != CONSTANT}
    return CONSTANT if not found else found.pop() if len(found) == 1 else MIXED


def _calls(eqn: JaxprEqn) -> bool:
    return _jax.primitive_name(eqn) in _jax.CALLS


def _is_condition(eqn: JaxprEqn, i: int) -> bool:
    return _jax.primitive_name(eqn) == "while" and i == 0


def _operands(eqn: JaxprEqn, reads: Sequence[Label], i: int) -> list[Label]:
    """What the inputs of an inner program are made from; what is carried may become anything."""
    name, params = _jax.primitive_name(eqn), eqn.params
    if name == "scan":
        consts, carried = _jax.scan_counts(params)
        return [*reads[:consts], *[MIXED] * carried, *reads[consts + carried :]]
    if name == "while":
        first, own = params["cond_nconsts"], params["body_nconsts"]
        return [*reads[first : first + own], *[MIXED] * len(reads[first + own :])]
    return [*reads[1:]] if name == "cond" else [*reads]


def _inside(eqn: JaxprEqn, around: _Around, scope: str, source: Source) -> _Around:
    name = _jax.primitive_name(eqn)
    return _Around(
        scope=scope,
        source=source,
        called=eqn.params.get("name") if name in ("jit", "pjit") else None,
        turns=(*around.turns, *_turns(name, eqn.params)),
        whiles=around.whiles or name == "while",
    )


def _turns(name: str, params: Mapping[str, Any]) -> tuple[int, ...]:
    if name == "scan":
        return (int(params["length"]),)
    if name == rebuilt.SHARDED:
        shape = params["mesh"].shape
        return (math.prod(shape[axis] for axis in _jax.manual_axes(params)),)
    return ()
