"""Scales: what track_scales found, as numbers by name, a table and a picture."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import numpy as np

from uscale_jax import _track_numbers
from uscale_jax._table import table
from uscale_jax._track_numbers import Sizes
from uscale_jax._track_rows import VALUE, TrackedValue
from uscale_jax.numerics._formats import Format


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("kept", "kept_of_gradients"),
    meta_fields=("tracked", "forward", "backward"),
)
@dataclass(frozen=True, eq=False)
class Scales:
    """How large the tensors of a model are; a pytree, which goes out of ``jax.jit``.

    Turns of loops are together in :attr:`values` and :attr:`gradients`, apart in
    :meth:`turns`.
    """

    kept: tuple[Any, ...] = field(repr=False)
    kept_of_gradients: tuple[Any, ...] = field(repr=False)
    tracked: tuple[TrackedValue, ...]
    """In the order of the program."""
    forward: Format
    """What values were held against."""
    backward: Format
    """What gradients were."""

    @property
    def values(self) -> Mapping[str, Sizes]:
        """Return the sizes of values by name; float32 scalars, of all turns together."""
        return {row.name: _pooled(kept) for row, kept in zip(self.tracked, self.kept, strict=True)}

    @property
    def gradients(self) -> Mapping[str, Sizes]:
        """Return the same of gradients, of those that have one."""
        both = zip(self.tracked, self.kept_of_gradients, strict=True)
        return {row.name: _pooled(kept) for row, kept in both if kept is not None}

    def turns(self, name: str, gradient: bool = False) -> Sizes:
        """Return sizes by turn of the loops around a value: arrays of its ``turns``.

        Raises:
          KeyError: no value is called so, or it has no gradient.
        """
        every = self.kept_of_gradients if gradient else self.kept
        found = {row.name: kept for row, kept in zip(self.tracked, every, strict=True)}
        if found.get(name) is None:
            raise KeyError(
                f"nothing tracked is called {name!r}. Expected: one of {[*found][:5]} and so on; "
                "gradients are there after value_and_grad, of what is not in a while loop."
            )
        return _track_numbers.sizes(found[name])

    def table(self, every: bool = False) -> str:
        """Return a table: of parameters, inputs and products, or of every value."""
        return _table(self, [row for row in self.tracked if every or row.kind != VALUE])

    def plot(
        self, path: str | os.PathLike[str], title: str = "", beside: Mapping[str, Scales] = {}
    ) -> None:
        """Draw root mean squares in the order of the program, over the ranges of the formats.

        Args:
          path: where to save it; the suffix says in which format.
          title: of this model.
          beside: others by title, of the same or other models, in panels to the right.

        Raises:
          ImportError: matplotlib is not installed.
        """
        from uscale_jax._track_plot import plot

        plot({title: self, **beside}, path)

    def __str__(self) -> str:
        """Return formats and a table of parameters, inputs and products."""
        more = sum(row.kind == VALUE for row in self.tracked)
        head = f"{self.forward.name} for values, {self.backward.name} for gradients"
        tail = [f"and {more} other values: .table(every=True)"] if more else []
        return "\n\n".join([head, self.table(), *tail])


def _pooled(kept: Any) -> Sizes:
    return _track_numbers.sizes(_track_numbers.together(kept))


_HEADER = (
    *("name", "at", "rms", "max", "underflow", "overflow"),
    *("gradient rms", "max", "underflow", "overflow"),
)


def _table(scales: Scales, rows: Sequence[TrackedValue]) -> str:
    values, gradients = jax.device_get((scales.values, scales.gradients))
    return table(_HEADER, [_line(row, values, gradients) for row in rows])


def _line(
    row: TrackedValue, values: Mapping[str, Sizes], gradients: Mapping[str, Sizes]
) -> list[str]:
    none = ["-"] * 4
    own = gradients.get(row.name)
    return [
        row.name,
        row.source or row.kind,
        *_cells(values[row.name]),
        *(none if own is None else _cells(own)),
    ]


def _cells(sizes: Sizes) -> Iterator[str]:
    if np.isnan(sizes.zeros):  # in a branch that was not taken
        yield from ["-"] * 4
        return
    yield from (f"{number:.3g}" for number in sizes[:2])
    yield from ("" if part == 0 else f"{part:.2%}" for part in sizes[2:4])
