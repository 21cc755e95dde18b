"""What reads the units that stay takes over what is lost, by least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax import _jax
from uscale_jax._calibration import Calibration
from uscale_jax._elimination import RIDGE, similar
from uscale_jax.trace.atoms import Atom, leaves
from uscale_jax.trace.layout import Places, units_of_places
from uscale_jax.trace.readings import Reading, columns, dim_length
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing

Array: TypeAlias = "np.ndarray[Any, Any]"


class Part(NamedTuple):
    """The elements of a leaf that one product reads with."""

    leaf: int
    big: Places
    """(turns, batch, places, columns), of the big model."""


def part(calibration: Calibration, reading: Reading) -> Part | None:
    """Returns the elements of the leaf that reads; None where they are computed."""
    if reading.view is None or not reading.fits:
        return None
    value = calibration.remade.traced.structure.program.inputs[reading.view.leaf]
    index = reading.view.elements(value)
    if index is None:
        return None
    turns = index.reshape(-1, *index.shape[len(reading.view.scans) :])
    return Part(reading.view.leaf, np.stack([columns(reading, each) for each in turns]))


def grams(calibration: Calibration) -> dict[int, Array]:
    """Returns the grams that were taken, by visit: (turns, batch, places, places)."""
    return {
        reading.visit: taken["gram"].reshape(-1, *taken["gram"].shape[-3:])
        for reading, taken in zip(calibration.readings, calibration.taken, strict=True)
        if taken is not None and "gram" in taken
    }


@dataclass
class _Fit:
    """Equal elements of a leaf, and the grams of all that they read."""

    part: Part
    reading: Reading
    gram: Array


def refitted(
    calibration: Calibration,
    params: Sequence[Any],
    units: Mapping[str, Array],
    merge: bool = False,
) -> dict[int, Array]:
    r"""Returns leaves of the big model in which places that stay do the work of those that go.

    .. math:: \min_\Delta \lVert X_S \Delta - X_G W_G \rVert^2 + \lambda \lVert \Delta \rVert^2

    with X what is read, S the places that stay and G those that go: where nothing is lost, nothing
    moves.  ``units`` are -1 for those that go.  With ``merge`` each is taken over by the one that
    is most like it, alone.
    """
    atoms = calibration.remade.atoms
    going = {atoms[name]: each < 0 for name, each in units.items() if (each < 0).any()}
    found: dict[int, Array] = {}
    for fit in _fits(calibration, set(going)):
        own = fit.part
        gone = _gone(fit.reading, going, own)
        if own.leaf not in found:
            found[own.leaf] = np.array(_jax.fetched(params[own.leaf]), np.float64)
        flat = found[own.leaf].reshape(-1)
        for turn in np.ndindex(own.big.shape[:2]):
            at = own.big[turn]
            how = _merged if merge else _taken_over
            flat[at[~gone]] += how(fit.gram[turn], flat[at[gone]], gone)
    return found


def _fits(calibration: Calibration, gone: set[Atom]) -> list[_Fit]:
    """What can be solved for: leaves that are only read, each with all that it reads."""
    known, readers = grams(calibration), _readers(calibration)
    found: dict[Any, _Fit] = {}
    for reading in calibration.readings:
        own = part(calibration, reading)
        lost = {atom for dim in reading.summed for atom in leaves(dim)} & gone
        if own is None or reading.first not in known or not lost:
            continue
        if not all((own.leaf, atom) in readers for atom in lost):
            continue
        gram = known[reading.first]
        gram = np.broadcast_to(gram, (*own.big.shape[:2], *gram.shape[-2:]))
        key = (own.leaf, own.big.shape, own.big.tobytes())
        if key in found:  # one leaf, read with several times: as in layers that share weights
            found[key].gram = found[key].gram + gram
        else:
            found[key] = _Fit(own, reading, gram)
    return _apart(list(found.values()))


def _apart(fits: Sequence[_Fit]) -> list[_Fit]:
    """Solves for elements that several products read together: all columns of equal elements.

    What shares only some of its rows with another is left as it is.
    """
    found: list[_Fit] = []
    by_leaf: dict[int, list[_Fit]] = {}
    for fit in fits:
        by_leaf.setdefault(fit.part.leaf, []).append(fit)
    for own in by_leaf.values():
        if len(own) == 1:
            found += own
            continue
        elements = [np.unique(fit.part.big) for fit in own]
        overlap = sum(map(len, elements)) > len(np.unique(np.concatenate(elements)))
        found += _by_column(own) if overlap else own
    return found


def _by_column(fits: Sequence[_Fit]) -> list[_Fit]:
    """One fit a column, with the grams of all that read it."""
    columns: dict[bytes, _Fit] = {}
    for fit in fits:
        for turn in np.ndindex(fit.part.big.shape[:2]):
            for column in fit.part.big[turn].T:
                gram = fit.gram[turn][None, None]
                known = columns.get(column.tobytes())
                if known is not None:
                    known.gram = known.gram + gram
                else:
                    part = Part(fit.part.leaf, column[None, None, :, None])
                    columns[column.tobytes()] = _Fit(part, fit.reading, gram)
    every = np.concatenate([fit.part.big.reshape(-1) for fit in columns.values()])
    elements, counts = np.unique(every, return_counts=True)
    shared = elements[counts > 1]
    return [fit for fit in columns.values() if not np.isin(fit.part.big, shared).any()]


def _readers(calibration: Calibration) -> set[tuple[int, Atom]]:
    """The leaves that are only ever summed over along an axis: nothing else reads them."""
    traced, found = calibration.remade.traced, set()
    known = roles(traced, frozenset(changing(traced)))
    for i, (value, own) in enumerate(zip(traced.structure.program.inputs, known, strict=False)):
        for dim, role in zip(traced.structure.of(value), own, strict=True):
            if role in (Role.READER, Role.SWITCH):
                found |= {(i, atom) for atom in leaves(dim)}
    return found


def _gone(reading: Reading, going: Mapping[Atom, Array], own: Part) -> Array:
    """Which places of a matrix go; a window has as many for each channel as it has pixels."""
    found = np.zeros(1, bool)
    for dim in reading.summed:
        gone = np.zeros(dim_length(dim), bool)
        for atom in dict.fromkeys(leaves(dim)):
            if atom in going:
                units = units_of_places(dim, atom, -1)
                gone |= (units >= 0) & going[atom][units]
        found = (found[:, None] | gone).reshape(-1)
    return np.repeat(found, own.big.shape[2] // len(found))


def _taken_over(gram: Array, weight: Array, gone: Array) -> Array:
    """What the places that stay have to add, for what those that go would have done."""
    inner, lost = gram[np.ix_(~gone, ~gone)], gram[np.ix_(~gone, gone)] @ weight
    ridge = RIDGE * np.trace(inner) / max(len(inner), 1) or 1.0
    return np.linalg.solve(inner + ridge * np.eye(len(inner)), lost)


def _merged(gram: Array, weight: Array, gone: Array) -> Array:
    """The same, of the one place that is most like each."""
    losses, shares = similar(gram, np.arange(len(gram)))
    losses, shares = losses[np.ix_(gone, ~gone)], shares[np.ix_(gone, ~gone)]
    best = np.argmin(losses, 1)
    found = np.zeros((int(np.sum(~gone)), weight.shape[1]))
    np.add.at(found, best, shares[np.arange(len(best)), best][:, None] * weight)
    return found
