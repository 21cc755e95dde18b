"""What reads the units that stay takes over what is lost, by least squares."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from uscale_jax._calibration import Calibration
from uscale_jax.trace.atoms import Atom, Dim, leaves
from uscale_jax.trace.layout import Places, units_of_places
from uscale_jax.trace.readings import Reading, columns, dim_length
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing

Array: TypeAlias = "np.ndarray[Any, Any]"

RIDGE = 1e-6
"""Of the mean square of what is read, what is added to all squares."""


class Part(NamedTuple):
    """The elements of a leaf that one product reads with: (turns, batch, places, columns)."""

    leaf: int
    big: Places
    small: Places


def part(calibration: Calibration, reading: Reading) -> Part | None:
    """Returns the elements of the big leaf and of the small one; None where they are computed."""
    if reading.view is None or reading.mutual or reading.groups > 1:
        return None
    value = calibration.remade.traced.structure.program.inputs[reading.view.leaf]
    big, small = (reading.view.elements(value, program) for program in (-1, 0))
    if big is None or small is None:
        return None
    return Part(reading.view.leaf, _turned(reading, big), _turned(reading, small))


def _turned(reading: Reading, index: Places) -> Places:
    scans = len(reading.view.scans) if reading.view else 0
    turns = index.reshape(-1, *index.shape[scans:])
    return np.stack([columns(reading, each) for each in turns])


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
    big: Sequence[Any],
    small: Sequence[Any],
    kept: Mapping[str, Sequence[int]],
) -> dict[int, Array]:
    """Returns leaves of the small model whose products come closest to the big model's.

    .. math:: \\min_W \\lVert X_S W - X W' \\rVert^2 + \\lambda \\lVert W - W_0 \\rVert^2

    with X what is read, S the places that stay, W' the big model's leaf and W₀ the small one's as
    it is: where nothing is lost, nothing moves.
    """
    units = {calibration.remade.atoms[name]: np.asarray(each) for name, each in kept.items()}
    found: dict[int, Array] = {}
    for fit in _fits(calibration, set(units)):
        own = fit.part
        rows = _rows(fit.reading, units, own)
        cols = kept_places(fit.reading.free, units)
        flat = found.setdefault(own.leaf, np.array(small[own.leaf], np.float64)).reshape(-1)
        weights = np.asarray(big[own.leaf]).reshape(-1)
        for turn in np.ndindex(own.big.shape[:2]):
            weight = weights[own.big[turn][:, cols]].astype(np.float64)
            at = own.small[turn]
            flat[at] = _solved(fit.gram[turn], weight, rows, flat[at])
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
    return list(found.values())


def _readers(calibration: Calibration) -> set[tuple[int, Atom]]:
    """The leaves that are only ever summed over along an axis: nothing else reads them."""
    traced, found = calibration.remade.traced, set()
    known = roles(traced, frozenset(changing(traced)))
    for i, (value, own) in enumerate(zip(traced.structure.program.inputs, known, strict=False)):
        for dim, role in zip(traced.structure.of(value), own, strict=True):
            if role in (Role.READER, Role.SWITCH):
                found |= {(i, atom) for atom in leaves(dim)}
    return found


def kept_places(dims: Sequence[Dim], kept: Mapping[Atom, Array]) -> Places:
    """Returns the row-major places along dimensions of the big model all of whose units stay."""
    found = np.zeros(1, np.int64)
    for dim in dims:
        size = dim_length(dim)
        stays = np.ones(size, bool)
        for atom in dict.fromkeys(leaves(dim)):
            if atom in kept:
                units = units_of_places(dim, atom, -1)
                stays &= (units < 0) | np.isin(units, kept[atom])
        found = (found[:, None] * size + np.flatnonzero(stays)).reshape(-1)
    return found


def _rows(reading: Reading, kept: Mapping[Atom, Array], own: Part) -> Places:
    """The kept places of a matrix; a window has as many for each channel as it has pixels."""
    pixels = own.big.shape[2] // math.prod(dim_length(dim) for dim in reading.summed)
    rows = kept_places(reading.summed, kept)
    return (rows[:, None] * pixels + np.arange(pixels)).reshape(-1)


def _solved(gram: Array, weight: Array, rows: Places, prior: Array) -> Array:
    inner = gram[np.ix_(rows, rows)]
    lost = gram[rows] @ weight - inner @ prior
    ridge = RIDGE * np.trace(inner) / max(len(rows), 1) or 1.0
    return prior + np.linalg.solve(inner + ridge * np.eye(len(rows)), lost)
