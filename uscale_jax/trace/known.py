"""Tables of numbers: what programs compute from neither parameters nor inputs, done beforehand.

Rotary embeddings turn pairs of places by angles that are computed from counting them.  Computed
here they are arrays, one of the small model and one of the big, which can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _jax
from uscale_jax._jax import ClosedJaxpr, JaxprEqn
from uscale_jax.trace import folding, lane_rules
from uscale_jax.trace.flat import aval, constants, flattened, live, substituted, variables
from uscale_jax.trace.program import without_repeats
from uscale_jax.trace.source import Source

_LIMIT = 1 << 22
"""Arrays of more elements are not computed."""

# What computes tables: arithmetic, and what moves and repeats elements.
_COMPUTED = (
    frozenset(folding._ARITHMETIC)
    | (folding._LAYOUT - {"device_put", "pvary", "sharding_constraint"})
    | lane_rules._ZERO_AT_ZERO
    | frozenset(
        (
            "atan2",
            "clamp",
            "complex",
            "concatenate",
            "conj",
            "cumsum",
            "div",
            "dot_general",
            "gather",
            "imag",
            "integer_pow",
            "iota",
            "log1p",
            "logistic",
            "pad",
            "real",
            "reduce_sum",
            "rem",
            "select_n",
            "split",
            "stack",
            "tile",
            "unstack",
        )
    )
)


class Tables(NamedTuple):
    """Programs whose tables are constants."""

    programs: list[ClosedJaxpr]
    sources: dict[int, Source]
    """By the id of a table, where it is computed."""


def with_tables(closed: Sequence[ClosedJaxpr]) -> Tables:
    """Returns programs in which tables that differ in size between them are constants.

    Of other sizes there is nothing to compare, so those are left as they are; so is everything
    where there are no tables, and what programs do that are not the same text.
    """
    flat = [flattened(each) for each in closed]
    names = [[*map(_jax.primitive_name, each.jaxpr.eqns)] for each in flat]
    if any(each != names[0] for each in names):
        return Tables([*closed], {})
    bodies, sources = _with_bodies(flat)
    flags = _known(bodies)
    at = _frontier(bodies, flags)
    arrays = [_computed(each, flags, _at(each, at)) for each in bodies]
    kept = [i for i, each in enumerate(zip(*arrays, strict=True)) if _varies(each)]
    pairs = zip(bodies, arrays, strict=True)
    found = [_replaced(b, _at(b, at), column, kept) for b, column in pairs]
    where = [Source(bodies[0].jaxpr.eqns[at[i][0]].source_info) for i in kept]
    for column in arrays:
        sources |= {id(column[i]): line for i, line in zip(kept, where, strict=True)}
    return Tables(found, sources) if sources else Tables([*closed], {})


def _with_bodies(flat: Sequence[ClosedJaxpr]) -> tuple[list[ClosedJaxpr], dict[int, Source]]:
    """Does the same within scans, whose steps all compute the same tables."""
    sources: dict[int, Source] = {}
    rows = []
    for eqns in zip(*(each.jaxpr.eqns for each in flat), strict=True):
        row: Sequence[JaxprEqn] = eqns
        if _jax.primitive_name(eqns[0]) == "scan":
            within = with_tables([eqn.params["jaxpr"] for eqn in eqns])
            sources |= within.sources
            row = [
                _jax.rebuilt(eqn, params={**eqn.params, "jaxpr": body})
                for eqn, body in zip(eqns, within.programs, strict=True)
            ]
        rows.append(row)
    if not sources:
        return [*flat], sources
    columns = zip(flat, zip(*rows, strict=True), strict=True)
    return [_jax.with_equations(each, eqns, constants(each)) for each, eqns in columns], sources


def _known(flat: Sequence[ClosedJaxpr]) -> list[bool]:
    """Whether each equation depends on nothing, in all programs."""
    known = [{v for v, a in constants(each).items() if not _jax.is_traced(a)} for each in flat]
    found = []
    for eqns in _rows(flat):
        pairs = list(zip(eqns, known, strict=True))
        fine = all(_computable(e) and have.issuperset(variables(e.invars)) for e, have in pairs)
        for eqn, have in pairs:
            have.update(eqn.outvars if fine else ())
        found.append(fine)
    return found


def _rows(flat: Sequence[ClosedJaxpr]) -> Iterator[tuple[JaxprEqn, ...]]:
    return zip(*(each.jaxpr.eqns for each in flat), strict=True)


def _computable(eqn: JaxprEqn) -> bool:
    avals = map(aval, (*eqn.invars, *eqn.outvars))
    return _jax.primitive_name(eqn) in _COMPUTED and all(
        math.prod(a.shape) <= _LIMIT and not jnp.issubdtype(a.dtype, jax.dtypes.extended)
        for a in avals
    )


def _frontier(flat: Sequence[ClosedJaxpr], known: Sequence[bool]) -> list[tuple[int, int]]:
    """The outputs of known equations that others read and whose sizes differ: (equation, output).

    What is only repeated is read before that.
    """
    read = set(variables(flat[0].jaxpr.outvars))
    found = []
    for i, eqns in reversed(list(enumerate(_rows(flat)))):
        repeats = _jax.primitive_name(eqns[0]) == "broadcast_in_dim"
        if not known[i] or (repeats and eqns[0].outvars[0] in read):
            read.update(variables(eqns[0].invars))
        if known[i] and not repeats:
            outputs = enumerate(zip(*(eqn.outvars for eqn in eqns), strict=True))
            found += [(i, j) for j, vs in outputs if vs[0] in read and _differ(vs)]
    return found[::-1]


def _differ(values: Sequence[Any]) -> bool:
    return len({aval(v).shape for v in values}) > 1


def _at(flat: ClosedJaxpr, at: Sequence[tuple[int, int]]) -> list[Any]:
    return [flat.jaxpr.eqns[i].outvars[j] for i, j in at]


def _computed(
    flat: ClosedJaxpr, known: Sequence[bool], wanted: Sequence[Any]
) -> list[np.ndarray[Any, Any]]:
    eqns = [eqn for eqn, fine in zip(flat.jaxpr.eqns, known, strict=True) if fine]
    program = _jax.with_equations(flat, eqns, constants(flat), invars=[], outvars=[*wanted])
    with _jax.concretely():
        return [np.asarray(array) for array in _jax.evaluate(live(program))]


def _varies(arrays: Sequence[np.ndarray[Any, Any]]) -> bool:
    """Whether numbers differ along an axis whose sizes do, in any program."""
    changed = [
        i for i, n in enumerate(zip(*(a.shape for a in arrays), strict=True)) if len({*n}) > 1
    ]
    return any(without_repeats(a).shape[i] > 1 for a in arrays for i in changed)


def _replaced(
    flat: ClosedJaxpr,
    wanted: Sequence[Any],
    arrays: Sequence[np.ndarray[Any, Any]],
    kept: Sequence[int],
) -> ClosedJaxpr:
    """The program that reads arrays in place of what computes them."""
    new: Mapping[Any, Any] = {wanted[i]: _jax.new_variable(wanted[i].aval) for i in kept}
    consts = constants(flat) | {new[wanted[i]]: arrays[i] for i in kept}
    return substituted(_jax.with_equations(flat, flat.jaxpr.eqns, consts), new)
