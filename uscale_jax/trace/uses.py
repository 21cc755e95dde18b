"""How every parameter leaf is used: what sums over it, and over how many inputs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from uscale_jax.trace.atoms import Size
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.source import Source
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.views import View, is_layout, views

SUMMED, FREE, SHARED = "summed", "free", "shared"
"""What a product does along a dimension of a leaf: sums over it, makes it, or has one each."""
LOOKUPS = ("gather", "dynamic_slice")


class Use(NamedTuple):
    """One equation that reads a leaf."""

    name: str
    """The primitive."""
    source: Source | None
    visit: int
    fan_in: Size
    """How many elements of the leaf one output sums over, in both programs."""
    fan_out: Size
    """How many outputs one input takes part in; of what is no product, the leaf's elements."""
    dims: tuple[str, ...] = ()
    """What a product does along every dimension of the leaf."""

    @property
    def is_product(self) -> bool:
        """Return whether it is a matrix product or a convolution."""
        return bool(self.dims)

    @property
    def is_lookup(self) -> bool:
        """Return whether rows of the leaf are picked by numbers."""
        return self.name in LOOKUPS


def uses(traced: Traced) -> list[list[Use]]:
    """Returns the uses of every leaf in the order of the program.

    A leaf that is normalised, cast or laid out anew before anything else reads it is followed to
    where it meets another value, as long as it keeps its shape.
    """
    program, count = traced.structure.program, len(traced.keys)
    seen = _followed(traced)
    found: list[list[Use]] = [[] for _ in range(count)]
    for eqn in program.equations:
        for side, value in enumerate(eqn.inputs):
            view = seen.get(id(value))
            if view is None or any(id(out) in seen for out in eqn.outputs):
                continue
            if eqn.name.startswith("loop_"):
                continue
            found[view.leaf].append(_use(traced, eqn, side, view))
    return found


def _followed(traced: Traced) -> dict[int, View]:
    """Views of leaves, and values of a view's shape that are computed from leaves alone."""
    program, count = traced.structure.program, len(traced.keys)
    seen = views(program, count)
    own = {id(value) for value in (*program.inputs[:count], *program.captured)}
    for eqn in program.equations:
        known = [seen[id(v)] for v in eqn.inputs if id(v) in seen]
        if all(id(v) in own or v.uniform is not None for v in eqn.inputs):
            own.update(map(id, eqn.outputs))
            for out in eqn.outputs:
                if known and id(out) not in seen and not is_layout(eqn.name):
                    same = [v for v in eqn.inputs if id(v) in seen and v.shape == out.shape]
                    if same and eqn.name not in _PRODUCTS:
                        seen[id(out)] = seen[id(same[0])]
    return seen


def _use(traced: Traced, eqn: Equation, side: int, view: View) -> Use:
    shape = traced.structure.program.inputs[view.leaf].shape
    if eqn.name not in _PRODUCTS or side > 1:
        return Use(eqn.name, eqn.source, eqn.visit, (1, 1), _product(_picked(eqn, side, shape)))
    summed, shared = _PRODUCTS[eqn.name](eqn, side)
    value = eqn.inputs[side]
    free = [i for i in range(value.ndim) if i not in (*summed, *shared)]
    kinds = {**dict.fromkeys(summed, SUMMED), **dict.fromkeys(shared, SHARED)}
    return Use(
        name=eqn.name,
        source=eqn.source,
        visit=eqn.visit,
        fan_in=_product([value.shape[i] for i in summed]),
        fan_out=_product([value.shape[i] for i in free]),
        dims=_dims(view, shape, value, kinds),
    )


def _picked(eqn: Equation, side: int, shape: Sequence[Size]) -> Sequence[Size]:
    """The dimensions of what one row is: of a table that is looked up, without its rows."""
    if eqn.name not in LOOKUPS or side:
        return shape
    pairs = zip(eqn.inputs[0].shape, eqn.sizes("slice_sizes"), strict=True)
    return [size for size, taken in pairs if size == taken]


def _product(sizes: Sequence[Size]) -> Size:
    return math.prod(size[0] for size in sizes), math.prod(size[-1] for size in sizes)


def _dims(
    view: View, shape: Sequence[Size], value: Value, kinds: Mapping[int, str]
) -> tuple[str, ...]:
    """What happens along each dimension of the leaf: where one goes, its index changes."""
    lead = len(view.scans)
    found = []
    for dim, size in enumerate(shape):
        line = np.arange(size[0]).reshape([-1 if i == dim else 1 for i in range(len(shape))])
        places = view.follow(np.broadcast_to(line, [each[0] for each in shape]), 0)
        along = [] if places is None else list(_varying(places))
        each = {SHARED if i < lead else kinds.get(i - lead, FREE) for i in along}
        found.append(next((kind for kind in (SUMMED, SHARED, FREE) if kind in each), FREE))
    return tuple(found)


def _varying(places: np.ndarray[Any, Any]) -> Iterator[int]:
    """The dimensions along which an array varies, seen from its first element."""
    for i in range(places.ndim):
        line = places[tuple(slice(None) if j == i else 0 for j in range(places.ndim))]
        if line.size > 1 and np.ptp(line):
            yield i


def _of_dot(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    summed, batch = eqn.param("dimension_numbers")
    return [*summed[side]], [*batch[side]]


def _of_ragged(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    numbers = eqn.param("ragged_dot_dimension_numbers")
    summed, batch = numbers.dot_dimension_numbers
    groups = numbers.rhs_group_dimensions if side else numbers.lhs_ragged_dimensions
    return [*summed[side]], [*batch[side], *groups]


def _of_convolution(eqn: Equation, side: int) -> tuple[list[int], list[int]]:
    numbers = eqn.param("dimension_numbers")
    if side == 0:  # what slides is the leaf: it is read as an image
        return [numbers.lhs_spec[1]], []
    return [*numbers.rhs_spec[1:]], []


_PRODUCTS = {
    "conv_general_dilated": _of_convolution,
    "dot_general": _of_dot,
    "ragged_dot_general": _of_ragged,
}
