"""What a unit is worth: numbers per unit from weights, gradients and what is read of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax import _factors, _jax
from uscale_jax._calibration import Calibration
from uscale_jax._elimination import Merging, Readers, eliminated
from uscale_jax._planning import Remade
from uscale_jax._reconstruct import Part, grams, part
from uscale_jax.trace import readings
from uscale_jax.trace.atoms import Atom, leaves
from uscale_jax.trace.layout import units_of_places
from uscale_jax.trace.readings import Reading
from uscale_jax.trace.roles import Role, roles
from uscale_jax.trace.sizes import changing

Vector: TypeAlias = "np.ndarray[Any, Any]"
Scores: TypeAlias = "dict[str, Vector]"


@jax.jit
def along_dimensions(params: Sequence[Any]) -> dict[tuple[int, int], jax.Array]:
    """Returns the sums of floating leaves over all dimensions but one, for each."""
    return {
        (i, dim): jnp.sum(x.astype(jnp.float32), [j for j in range(x.ndim) if j != dim])
        for i, x in enumerate(params)
        if _factors.is_scaled(x)
        for dim in range(x.ndim)
    }


def of_leaves(remade: Remade, sums: Mapping[tuple[int, int], Any]) -> dict[str, list[Vector]]:
    """Returns per axis the sums over each unit's elements, one vector a leaf and dimension.

    ``sums`` are over all other dimensions, by the place of the leaf and the dimension.
    """
    structure = remade.traced.structure
    found: dict[str, list[Vector]] = {name: [] for name in remade.atoms}
    for (leaf, dim), values in sums.items():
        dims = structure.of(structure.program.inputs[leaf])
        for name, atom in remade.atoms.items():
            units = units_of_places(dims[dim], atom, -1)
            inside = units >= 0
            if inside.any():
                weights = np.asarray(_jax.fetched(values), np.float64)[inside]
                counted = np.bincount(units[inside], weights=weights, minlength=atom.size[-1])
                found[name].append(counted)
    return found


def by_magnitude(remade: Remade, params: Sequence[Any]) -> Scores:
    """Returns the norm of all elements of every unit."""
    squares = along_dimensions([jnp.square(jnp.abs(x).astype(jnp.float32)) for x in params])
    return {name: np.sqrt(np.sum(each, 0)) for name, each in of_leaves(remade, squares).items()}


def of_readings(calibration: Calibration, what: str) -> Scores:
    """Returns per axis the mean over its readings of what was taken, as shares of the sum.

    Axes that no product reads are left out.
    """
    found = {}
    for name, atom in calibration.remade.atoms.items():
        shares = [
            values / values.sum()
            for reading, taken in zip(calibration.readings, calibration.taken, strict=True)
            if taken is not None and atom in reading.atoms()
            for values in [reading.per_unit(_summed(_of(taken, what), reading), atom)]
            if values is not None and values.sum() > 0
        ]
        if shares:
            found[name] = np.mean(shares, 0)
    return found


def _of(taken: Mapping[str, Any], what: str) -> Vector:
    return readings.spread(taken) if what == "spread" else taken[what]


def _summed(values: Vector, reading: Reading) -> Vector:
    """Sums over the turns of scans through layers."""
    scans = len(reading.view.scans) if reading.view else 0
    return values.sum(tuple(range(scans)))


def by_reconstruction(
    calibration: Calibration,
    params: Sequence[Any],
    classes: Mapping[str, Vector],
    kind: type[Readers] | type[Merging] = Readers,
) -> Scores:
    """Returns what the products that read an axis lose, the units that are left making up for it.

    ``kind`` says how they do: all together (least squares), or each for what is most like it.

    Only where these products are all that becomes of the units.  What a stream carries is more
    than what is read of it, and there shares of squares choose better.
    """
    private = _private(calibration.remade)
    scores = of_readings(calibration, "square")
    known = grams(calibration)
    for name, atom in calibration.remade.atoms.items():
        units = classes[name]
        readers = [
            kind(*each)
            for reading in calibration.readings
            if atom in private and atom in reading.atoms() and reading.first in known
            for each in _readers(calibration, reading, known[reading.first], params, atom, units)
        ]
        if readers:
            count = units.max() + 1
            together = eliminated(readers, count, min(count, atom.size[0]))
            scores[name] = (together / np.bincount(units))[units]
    return scores


def _private(remade: Remade) -> set[Atom]:
    """The axes whose readers are all that becomes of their units."""
    traced, found = remade.traced, set()
    known = roles(traced, frozenset(changing(traced)))
    for value, own in zip(traced.structure.program.inputs, known, strict=False):
        for dim, role in zip(traced.structure.of(value), own, strict=True):
            found |= set(leaves(dim)) if role is Role.SWITCH else set()
    return found & set(remade.atoms.values())


def _readers(
    calibration: Calibration,
    reading: Reading,
    gram: Vector,
    params: Sequence[Any],
    atom: Atom,
    classes: Vector,
) -> Iterator[tuple[Vector, Vector, Vector]]:
    """Gram, weights and units of what reads an axis, for every turn of a scan through layers."""
    own = part(calibration, reading)
    if own is None:
        return
    units = _units(reading, atom, own)
    units = np.where(units < 0, -1, classes[units])
    gram = np.broadcast_to(gram, (*own.big.shape[:2], *gram.shape[-2:]))
    for turn in np.ndindex(own.big.shape[:2]):
        weight = np.asarray(_jax.fetched(params[own.leaf])).reshape(-1)[own.big[turn]]
        yield gram[turn], weight.astype(np.float64), units


def _units(reading: Reading, atom: Atom, own: Part) -> Vector:
    """The unit of every place of the matrix; pixels of a window are places of their channel."""
    found = np.full(1, -1, np.int64)
    for dim in reading.summed:
        found = np.maximum(found[:, None], units_of_places(dim, atom, -1)[None]).reshape(-1)
    return np.repeat(found, own.big.shape[2] // len(found))
