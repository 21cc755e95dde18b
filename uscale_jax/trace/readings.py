"""Where units of an axis are read: products that sum over them, as matrices.

A unit matters through what reads it.  Readers are matrix products and convolutions, and what they
read is put in one form, ``(batch, rows, places) @ (batch, places, columns)``, whatever the order of
dimensions in the model: ``places`` are what is summed over, ``rows`` are examples, tokens, pixels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from uscale_jax.trace.atoms import Atom, leaves
from uscale_jax.trace.description import Dims
from uscale_jax.trace.layout import Places, units_of_places
from uscale_jax.trace.program import Equation, Program
from uscale_jax.trace.tracing import Traced
from uscale_jax.trace.views import View, views

PRODUCTS = ("dot_general", "conv_general_dilated")


@dataclass(frozen=True)
class Reading:
    """One product that sums over places of an activation."""

    eqn: Equation
    side: int
    """Which operand is the activation; the other one reads it."""
    view: View | None
    """The parameter leaf that reads it; None where it is computed."""
    mutual: bool
    """Whether both operands are activations, as queries and keys are."""
    batch: Dims
    summed: Dims
    """The dimensions of the activation that are common to both operands, and summed over."""
    free: Dims
    """The other dimensions of what reads it: the columns."""
    first: int
    """The visit of the first reading of the same activation along the same dimensions."""

    @property
    def visit(self) -> int:
        """Return which equation of the jaxpr it is."""
        return self.eqn.visit

    @property
    def is_convolution(self) -> bool:
        """Return whether windows slide over the activation."""
        return self.eqn.name != "dot_general"

    @property
    def fits(self) -> bool:
        """Return whether least squares can say what should read it: one real kernel."""
        real = all(jnp.issubdtype(v.dtype, jnp.floating) for v in self.eqn.inputs[:2])
        return real and not self.mutual and self.groups == 1

    @property
    def groups(self) -> int:
        """Return into how many groups a convolution cuts channels."""
        return self.eqn.number("feature_group_count")[-1] if self.is_convolution else 1

    @property
    def dims(self) -> Dims:
        """Return the dimensions that places are of, after batch entries where those are weights'.

        What is common to two activations is no more than a place where they meet.
        """
        return [*self.summed] if self.mutual else [*self.batch, *self.summed]

    def atoms(self) -> set[Atom]:
        """Return the axes that are read here."""
        return {atom for dim in self.dims for atom in leaves(dim)}

    def per_unit(self, values: Any, atom: Atom) -> np.ndarray[Any, Any] | None:
        """Return sums over the places of every unit, of values per batch and place.

        None where the axis is not read here.
        """
        dims = self.dims
        sizes = [dim_length(dim) for dim in dims]
        grid = np.asarray(values, np.float64).reshape(sizes)
        total = None
        for i, dim in enumerate(dims):
            units = units_of_places(dim, atom, -1)
            if (units >= 0).any():
                rest = tuple(j for j in range(len(dims)) if j != i)
                found = _counted(units, grid.sum(rest), atom.size[-1])
                total = found if total is None else total + found
        return total

    def places(self, dims: Dims, kept: Any) -> Places:
        """Return which of the row-major places along ``dims`` are kept, given those of a dim."""
        index = np.zeros(1, np.int64)
        for dim in dims:
            index = (index[:, None] * dim_length(dim) + kept(dim)).reshape(-1)
        return index


def dim_length(dim: Any) -> int:
    """Returns the size of a dimension in the big program."""
    return math.prod(atom.size[-1] for atom in dim)


def _counted(units: Places, values: Any, size: int) -> np.ndarray[Any, Any]:
    inside = units >= 0
    return np.bincount(units[inside], weights=values[inside], minlength=size)


def readings(traced: Traced) -> list[Reading]:
    """Returns all products of activations, in the order of the program."""
    program = traced.structure.program
    count = len(traced.keys)
    seen, active = views(program, count), activations(program, count)
    found: list[Reading] = []
    firsts: dict[Any, int] = {}
    for eqn in program.equations:
        sides = [i for i, value in enumerate(eqn.inputs) if id(value) in active]
        if eqn.name in PRODUCTS:
            found += [_reading(traced, eqn, side, sides, seen, firsts) for side in sides]
    return [reading for reading in found if reading.summed or reading.batch]


def activations(program: Program, leaves: int) -> set[int]:
    """Returns ids of the values that depend on inputs; what a loop carries may become one in it."""
    active = {id(v) for v in program.inputs[leaves:]}
    while True:
        before = len(active)
        for eqn in program.equations:
            if any(id(value) in active for value in eqn.inputs):
                active.update(map(id, eqn.outputs))
                if eqn.name == "loop_close":
                    active.add(id(eqn.inputs[0]))
        if len(active) == before:
            return active


def _reading(
    traced: Traced,
    eqn: Equation,
    side: int,
    sides: Sequence[int],
    seen: dict[int, View],
    firsts: dict[Any, int],
) -> Reading:
    own, other = (traced.structure.of(value) for value in (eqn.inputs[side], eqn.inputs[1 - side]))
    batch, summed, free = _dims(eqn, side)
    view = seen.get(id(eqn.inputs[1 - side]))
    # One gram does for all that read the same, as often and by the same layers.
    windows = eqn.visit if eqn.name != "dot_general" else None
    turns = (eqn.region, view.scans if view else ())
    same = (id(eqn.inputs[side]), tuple(batch), tuple(summed), windows, turns)
    return Reading(
        eqn=eqn,
        side=side,
        view=view,
        mutual=len(sides) > 1,
        batch=[own[i] for i in batch],
        summed=[own[i] for i in summed],
        free=[other[i] for i in free],
        first=firsts.setdefault(same, eqn.visit),
    )


def _dims(eqn: Equation, side: int) -> tuple[list[int], list[int], list[int]]:
    """Batch and summed dimensions of the activation, free ones of what reads it."""
    if eqn.name != "dot_general":
        numbers = eqn.param("dimension_numbers")
        return ([], [numbers.lhs_spec[1]], [numbers.rhs_spec[0]]) if side == 0 else ([], [], [])
    summed, batch = eqn.param("dimension_numbers")
    used = {*summed[1 - side], *batch[1 - side]}
    free = [i for i in range(eqn.inputs[1 - side].ndim) if i not in used]
    return [*batch[side]], [*summed[side]], free


def matrices(reading: Reading, operands: Sequence[Any]) -> tuple[jax.Array, jax.Array]:
    """Returns the activation, (batch, rows, places), and what reads it, (batch, places, columns).

    The windows of a convolution are rows, their pixels places: (channel, pixel), channel first.
    """
    if reading.is_convolution:
        return _windows(reading, operands[0], operands[1]), columns(reading, operands[1])
    summed, batch = reading.eqn.param("dimension_numbers")
    x = _matrix(operands[reading.side], batch[reading.side], summed[reading.side])
    return x, columns(reading, operands[1 - reading.side])


def columns(reading: Reading, other: Any) -> Any:
    """Returns what reads an activation as (batch, places, columns); NumPy arrays as such."""
    if reading.is_convolution:
        kernel = other.transpose(reading.eqn.params[-1]["dimension_numbers"].rhs_spec)
        return kernel.reshape(1, kernel.shape[0], -1).swapaxes(1, 2)
    summed, batch = reading.eqn.param("dimension_numbers")
    side = 1 - reading.side
    return _matrix(other, batch[side], summed[side]).swapaxes(1, 2)


def _matrix(x: Any, batch: Sequence[int], summed: Sequence[int]) -> Any:
    """(batch, rest, summed)."""
    rest = [i for i in range(x.ndim) if i not in (*batch, *summed)]
    x = x.transpose((*batch, *rest, *summed))
    shape = x.shape
    a, b = len(batch), len(batch) + len(rest)
    return x.reshape(math.prod(shape[:a]), math.prod(shape[a:b]), math.prod(shape[b:]))


def _windows(reading: Reading, x: Any, kernel: Any) -> jax.Array:
    params = reading.eqn.params[-1]
    numbers = params["dimension_numbers"]
    patches = jax.lax.conv_general_dilated_patches(
        jnp.transpose(x, numbers.lhs_spec),
        filter_shape=[kernel.shape[i] for i in numbers.rhs_spec[2:]],
        window_strides=params["window_strides"],
        padding=params["padding"],
        lhs_dilation=params["lhs_dilation"],
        rhs_dilation=params["rhs_dilation"],
    )
    return jnp.moveaxis(patches, 1, -1).reshape(1, -1, patches.shape[1])


def gram(reading: Reading, operands: Sequence[Any]) -> jax.Array:
    """Returns the sum over rows of x·xᵀ: (batch, places, places)."""
    x = matrices(reading, operands)[0].astype(jnp.float32)
    return jnp.einsum("bnk,bnl->bkl", x, x, precision="highest")


def energies(reading: Reading, operands: Sequence[Any]) -> dict[str, jax.Array]:
    """Returns what to know of what is read, per batch and place, to be added up.

    Sums over rows of x, |x| and x², the number of rows, the square of what reads it, how often
    that was added, and x² by that square.
    """
    if reading.is_convolution:
        x, weight = _channels(reading, *operands)
    else:
        x, other = matrices(reading, operands)
        weight = jnp.sum(jnp.square(_real(other)), 2)
    total, x = jnp.sum(x, 1), _real(x)
    total = jnp.abs(total) if jnp.iscomplexobj(total) else total
    square = jnp.sum(jnp.square(x), 1)
    one = jnp.ones((1, 1), jnp.float32)
    found = {
        "sum": total.astype(jnp.float32),
        "abs": jnp.sum(x, 1),
        "square": square,
        "count": x.shape[1] * one,
        "weight": weight,
        "turns": one,
        "energy": square * weight,
    }
    if reading.mutual:  # a place adds q·k to the score of every pair: places alone are known
        return {name: jnp.sum(each, 0, keepdims=True) for name, each in found.items()}
    return found


def spread(taken: Mapping[str, Any]) -> Any:
    """Returns the sum of squares about the mean, by the square of what reads: as ``energy``."""
    mean = np.square(taken["sum"]) / taken["count"]
    return np.maximum(taken["square"] - mean, 0) * taken["weight"] / taken["turns"]


def _real(x: Any) -> jax.Array:
    """|x| in float32."""
    return jnp.abs(x).astype(jnp.float32)


def _channels(reading: Reading, x: Any, kernel: Any) -> tuple[jax.Array, jax.Array]:
    """A convolution's channels as places, all pixels as rows; grouped channels have own weights."""
    numbers = reading.eqn.params[-1]["dimension_numbers"]
    x = jnp.moveaxis(x, numbers.lhs_spec[1], -1)
    kernel = jnp.transpose(kernel, numbers.rhs_spec)
    grouped = _real(kernel.reshape(reading.groups, -1, *kernel.shape[1:]))
    weight = jnp.sum(jnp.square(grouped), (1, *range(3, grouped.ndim))).reshape(1, -1)
    return x.reshape(1, -1, x.shape[-1]), weight
