"""Values that are a parameter leaf laid out in another way, and which element is which."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from uscale_jax.trace.layout import Places
from uscale_jax.trace.program import Equation, Program, Value


class View(NamedTuple):
    """A leaf, and the equations that lay it out, with the output of each that is followed."""

    leaf: int
    steps: tuple[tuple[Equation, int], ...] = ()

    @property
    def scans(self) -> tuple[int, ...]:
        """Return the scans that go through the leaf, outermost first, by their visits."""
        return tuple(eqn.visit for eqn, _ in self.steps if eqn.name == "loop_slice")

    def elements(self, value: Value, program: int = -1) -> Places | None:
        """Return the element of the leaf that every element of the view is, in one program.

        The steps of scans come first, one dimension a scan.  None where it has elements that are
        no element of the leaf, or a leaf's several times.
        """
        shape = [size[program] for size in value.shape]
        return self.follow(np.arange(math.prod(shape)).reshape(shape), program)

    def follow(self, places: Places, program: int) -> Places | None:
        """Return what becomes of an array of the leaf's shape, with the steps of scans first."""
        lead = 0
        for eqn, out in self.steps:
            if eqn.name == "loop_slice":
                lead += 1
                continue
            found = _LAYOUTS[eqn.name](places, _At(eqn, out, lead, program))
            if found is None:
                return None
            places = found
        return places


def views(program: Program, count: int) -> dict[int, View]:
    """Returns the views of the first ``count`` inputs, the leaves, by the id of the value."""
    found = {id(value): View(i) for i, value in enumerate(program.inputs[:count])}
    for eqn in program.equations:
        known = found.get(id(eqn.inputs[0])) if eqn.inputs else None
        if known is not None and (eqn.name in _LAYOUTS or eqn.name == "loop_slice"):
            for i, value in enumerate(eqn.outputs):
                found[id(value)] = View(known.leaf, (*known.steps, (eqn, i)))
    return found


def is_layout(name: str) -> bool:
    """Returns whether a primitive only lays out what it is given."""
    return name in _LAYOUTS


class _At(NamedTuple):
    """An equation in one program, the output that is followed, and how many scans are in front."""

    eqn: Equation
    out: int
    lead: int
    program: int

    @property
    def params(self) -> Any:
        return self.eqn.params[self.program]


def _reshaped(places: Places, at: _At) -> Places | None:
    inner = [size[at.program] for size in at.eqn.outputs[at.out].shape]
    shape = [*places.shape[: at.lead], *inner]
    return places.reshape(shape) if math.prod(shape) == places.size else None


def _transposed(places: Places, at: _At) -> Places:
    order = [at.lead + int(i) for i in at.params["permutation"]]
    return places.transpose([*range(at.lead), *order])


def _sliced(places: Places, at: _At) -> Places:
    params = at.params
    strides = params["strides"] or [1] * len(params["start_indices"])
    spans = zip(params["start_indices"], params["limit_indices"], strides, strict=True)
    cut = [slice(int(start), int(stop), int(step)) for start, stop, step in spans]
    return places[(*[slice(None)] * at.lead, *cut)]


def _split(places: Places, at: _At) -> Places:
    ends = np.cumsum([int(n) for n in at.params["sizes"]])[:-1]
    return np.split(places, ends, axis=at.lead + int(at.params["axis"]))[at.out]


def _same(places: Places, at: _At) -> Places:
    return places


_LAYOUTS: dict[str, Callable[[Any, _At], Places | None]] = {
    "broadcast_in_dim": _reshaped,
    "convert_element_type": _same,
    "copy": _same,
    "copy_p": _same,
    "expand_dims": _reshaped,
    "reshape": _reshaped,
    "sharding_constraint": _same,
    "slice": _sliced,
    "split": _split,
    "squeeze": _reshaped,
    "stop_gradient": _same,
    "transpose": _transposed,
}
"""What equations do to places; scans put theirs in front."""
