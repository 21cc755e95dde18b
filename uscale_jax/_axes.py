"""trace_axes: which dimensions of which parameters are the same axis, and which can change."""

from __future__ import annotations

import itertools
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from uscale_jax import _tree
from uscale_jax._table import places_words, shape_words, table
from uscale_jax._types import Apply, Tree
from uscale_jax.trace import atoms
from uscale_jax.trace.atoms import Atom, Dim
from uscale_jax.trace.sizes import places
from uscale_jax.trace.tracing import Model, Traced, trace

_UNREAD = "the program does not read it on these inputs"


@dataclass(frozen=True)
class Axis:
    """One axis of a model: dimensions, or factors or parts of dimensions, that are the same."""

    name: str
    """A letter; capital for an axis that cannot change."""
    size: int
    free: bool
    """Whether the size can change with the function kept (by replication and factors)."""
    why: str
    """Why it cannot, with the source line where there is one; or what to know about a free one."""
    places: tuple[tuple[str, int], ...]
    """Where it occurs: the names of leaves, and which dimension."""


@dataclass(frozen=True)
class Concatenation:
    """Dimensions laid one after the other, as the q, k and v of a fused kernel are."""

    parts: tuple[Dimension, ...]

    def __str__(self) -> str:
        """Return ``(a·b | a·b | a·c)``."""
        return "(" + " | ".join(map(str, self.parts)) + ")"


@dataclass(frozen=True)
class Dimension:
    """A dimension as a product of axes and concatenations, row-major: the last changes fastest."""

    size: int
    factors: tuple[Axis | Concatenation, ...]

    def __str__(self) -> str:
        """Return ``a·b``; 1 for the empty product."""
        names = [f.name if isinstance(f, Axis) else str(f) for f in self.factors]
        return "·".join(names) or "1"


@dataclass(frozen=True)
class Axes:
    """What the dimensions of a model's parameters are; ``print`` shows it as two tables."""

    leaves: Mapping[str, tuple[Dimension, ...]]
    """Every parameter leaf by name, with its dimensions."""
    axes: tuple[Axis, ...]
    """Every axis that parameters have, in order of first occurrence."""

    @property
    def free(self) -> tuple[Axis, ...]:
        """Return the axes whose size can change."""
        return tuple(axis for axis in self.axes if axis.free)

    @property
    def fixed(self) -> tuple[Axis, ...]:
        """Return the axes whose size cannot change."""
        return tuple(axis for axis in self.axes if not axis.free)

    def __str__(self) -> str:
        """Return a table of leaves and a table of axes."""
        leaves = [
            (name, shape_words(d.size for d in dims), shape_words(dims))
            for name, dims in self.leaves.items()
        ]
        axes = [
            (
                axis.name,
                str(axis.size),
                "free" if axis.free else "fixed",
                places_words(axis.places),
                axis.why,
            )
            for axis in self.axes
        ]
        return "\n\n".join(
            [
                table(("leaf", "shape", "dimensions"), leaves),
                table(("axis", "size", "", "places", "why"), axes),
            ]
        )


def trace_axes(apply: Apply, params: Tree, *inputs: Any) -> Axes:
    """Returns what every dimension of every parameter is, read off the model's program.

    The model is traced (``jax.make_jaxpr``; nothing is computed), and each primitive says which
    dimensions of its operands and results are the same, row-major products, or parts of one
    another.  No names are looked at and nothing is guessed from ranks.

    * Dimensions that meet are one axis: residual streams, the two sides of a contraction.
    * A reshape factors a dimension (heads · head size), a split or a concatenation makes it a sum
      (``q | k | v``, the gates of an LSTM), flattened features are products.
    * Inputs, outputs, places that are counted or looked up (``iota``, embeddings, RoPE), orders
      (``sort``, ``top_k``, ``cumsum``), captured arrays and primitives without a rule hold an
      axis still; the axis then says why, and at which line of the model.

    An axis is *free* where equal copies of its units, with some power of the number of copies on
    the parameters, can keep the function.  Which powers, and whether there are any, say
    ``trace_exponents(..., big=...)``: a LayerNorm over the axis, say, asks that all units get
    equally many copies.

    Args:
      apply: ``apply(params, *inputs)``, any pure function that JAX can trace.
      params: the parameter tree: arrays or ``jax.ShapeDtypeStruct``.
      *inputs: inputs, likewise.  Sizes that are equal by accident (batch and width, say) may be
        taken for one axis by a reshape; use inputs and sizes that are all different.

    Returns:
      :class:`Axes`.

    Raises:
      TypeError, ValueError: what tracing ``apply`` raises.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> import uscale_jax as us
      >>> def apply(params, x):
      ...     q, k = jnp.split(x @ params["qk"], 2, axis=-1)
      ...     return jnp.tanh(q * k) @ params["out"]
      >>> f32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
      >>> axes = us.trace_axes(apply, {"qk": f32(5, 14), "out": f32(7, 3)}, f32(2, 5))
      >>> print(axes)
      leaf  shape   dimensions
      out   7 × 3   a × B
      qk    5 × 14  C × (a | a)
      <BLANKLINE>
      axis  size         places         why
      a     7     free   out[0], qk[1]
      B     3     fixed  out[1]         is an axis of the output
      C     5     fixed  qk[0]          is an axis of input 0
      >>> [axis.places for axis in axes.free]
      [(('out', 0), ('qk', 1))]

    References:
      The rules per primitive are kin to the op-sharding rules of Shardy (OpenXLA); the method is
      this library's own.
    """
    return read_axes(trace([Model(apply, params)], inputs))


def read_axes(traced: Traced) -> Axes:
    """Returns the axes of a traced model (of the first one, if it was traced with another)."""
    named = named_axes(places(traced))
    leaves = {
        _tree.name(key): tuple(_dimension(dim, named) for dim in traced.structure.of(value))
        for key, value in zip(traced.keys, traced.structure.program.inputs, strict=False)
    }
    return Axes(leaves, tuple(named.values()))


def named_axes(where: Mapping[Atom, list[tuple[str, int]]]) -> dict[Atom, Axis]:
    """Returns axes with letters, given where each occurs."""
    names = _letters()
    named = {}
    for atom, at in where.items():
        free = atom.fixed is None or not atom.read
        name = next(names)
        why = _UNREAD if not atom.read else str(atom.fixed or "")
        named[atom] = Axis(name if free else name.upper(), atom.size[0], free, why, tuple(at))
    return named


def _letters() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    for length in itertools.count(1):
        for letters in itertools.product(string.ascii_lowercase, repeat=length):
            yield "".join(letters)


def _dimension(dim: Dim, named: Mapping[Atom, Axis]) -> Dimension:
    factors: list[Axis | Concatenation] = []
    for atom in atoms.resolve(dim):
        if atom.parts is None:
            factors.append(named[atom])
        else:
            factors.append(Concatenation(tuple(_dimension(part, named) for part in atom.parts)))
    return Dimension(atoms.dim_size(dim, 1)[0], tuple(factors))
