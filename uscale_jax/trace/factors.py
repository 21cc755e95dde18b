"""What multiplies every value when parameters are multiplied or replicated: one walk.

Every value has an array of cells, one for every combination of the parts of its dimensions
(``q | k | v``), each with an affine expression in the unknown factors of parameter cells.  A
primitive's description says how the expressions of its operands give those of its results, and
which equations must hold for the function to be the same.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from uscale_jax.trace import shifts
from uscale_jax.trace.affine import ZERO, Expr, plus
from uscale_jax.trace.atoms import alternatives, is_opaque
from uscale_jax.trace.axes import Structure
from uscale_jax.trace.combine import LAYOUT, Labels
from uscale_jax.trace.description import Blocks, Labelled, Regrouped
from uscale_jax.trace.equations import (
    Cell,
    Cells,
    System,
    constant_cell,
    one_cell,
    same_arrays,
    same_number,
)
from uscale_jax.trace.layout import cell_name
from uscale_jax.trace.program import Equation, Value
from uscale_jax.trace.source import Source

# Expressions longer than this get a name of their own, so that depth costs linear time.
_LONG = 12


def build(structure: Structure, leaf_names: Sequence[str], *, shifting: bool = False) -> System:
    """Returns the equations of a program whose first inputs are the parameters ``leaf_names``.

    With ``shifting``, factors of leaves that are only read as ``c + leaf`` are factors of the sum.
    """
    none = shifts.Shifts({}, frozenset())
    walk = _Walk(structure, shifts.find(structure.program, len(leaf_names)) if shifting else none)
    for value, name in zip(structure.program.inputs, leaf_names, strict=False):
        walk.add_leaf(value, name)
    for value in structure.program.captured:
        walk.add_captured(value)
    for eqn, description in zip(structure.program.equations, structure.descriptions, strict=True):
        walk.step(eqn, description)
    walk.system.outputs = [walk.cells(value) for value in structure.program.outputs]
    return walk.system


class _Walk:
    """Carries cells through a program."""

    def __init__(self, structure: Structure, shifted: shifts.Shifts) -> None:
        self.structure = structure
        self.shifted = shifted
        self.system = System(shifts=shifted.by_leaf)
        self.known: dict[int, Cells] = {}
        self.views: dict[int, bool] = {}

    # Where values come from.

    def add_leaf(self, value: Value, name: str) -> None:
        """Gives every cell of a parameter an unknown."""
        dims = self.structure.of(value)
        cells = np.empty([alternatives(dim) for dim in dims], object)
        for place in np.ndindex(cells.shape):
            part = cell_name(dims, place, cells.shape)
            cells[place] = self.system.unknown(name + part) if value.scales else ZERO
            self.system.leaf_of |= dict.fromkeys(cells[place], len(self.system.leaf_cells))
        self.system.leaf_cells.append(cells)
        self.known[id(value)] = cells
        self.views[id(value)] = value.scales

    def add_captured(self, value: Value) -> None:
        """An array of numbers must be the same in both programs, up to a factor."""
        if value.uniform is not None or value.captured is None:
            return
        if not same_arrays(value.captured[0], value.captured[-1]):
            self._clash("an array that the function closes over is another in the big model", None)
        self.known[id(value)] = one_cell(ZERO, value.ndim)

    def _clash(self, text: str, source: Source | None) -> Expr:
        self.system.require({"~1": 1}, text, source)
        return ZERO

    def cells(self, value: Value, source: Source | None = None) -> Cells:
        """Returns the cells of a value."""
        if value.uniform is not None:
            return one_cell(self._constant(value, source), value.ndim)
        return self.known.get(id(value), one_cell(ZERO, value.ndim))

    def _constant(self, value: Value, source: Source | None) -> Cell:
        assert value.uniform is not None
        numbers = value.uniform
        if value.scales:
            try:
                return constant_cell(numbers, value.dtype)
            except ValueError as error:
                return self._clash(f"a constant is {error}", source)
        if not same_number(numbers[0], numbers[-1]):
            self._clash(f"an integer is {numbers[0]} (small), {numbers[-1]} (big)", source)
        return ZERO

    # What equations make of them.

    def step(self, eqn: Equation, what: Labelled | Regrouped | Blocks) -> None:
        """Works out the cells of an equation's outputs."""
        if isinstance(what, Labelled):
            found = Labels(self, eqn, what).results()
        elif isinstance(what, Regrouped):
            found = [self._regrouped(eqn, what)]
        else:
            found = self._blocks(eqn, what)
        for value, cells in zip(eqn.outputs, found, strict=True):
            if value.scales:
                self.known[id(value)] = self._short(cells)
            else:
                self._counts(eqn, cells)
                self.known[id(value)] = one_cell(ZERO, value.ndim)
        self._follow_views(eqn)

    def _counts(self, eqn: Equation, cells: Cells) -> None:
        """Integers that are added up count the replicas, and whoever reads them would notice."""
        if not any(value.scales for value in eqn.inputs):
            for cell in cells.flat:
                if cell:
                    self.system.require(cell, f"`{eqn.name}` counts in integers", eqn.source)

    def _follow_views(self, eqn: Equation) -> None:
        """A view of a parameter is the parameter laid out in another way."""
        if self.is_shift(eqn):  # c + leaf is what counts as the parameter from here on
            seen = True
        else:
            seen = eqn.name in LAYOUT and bool(eqn.inputs) and self.is_view(eqn.inputs[0])
        for value in eqn.outputs:
            self.views[id(value)] = seen

    def is_shift(self, eqn: Equation) -> bool:
        """Whether an equation adds the constant that a leaf is always read with."""
        return id(eqn) in self.shifted.equations

    def is_view(self, value: Value) -> bool:
        """Whether a value is a parameter, laid out in whatever way."""
        return self.views.get(id(value), False)

    def suggest(self, cell: Cell, wish: Expr, kernel: bool) -> None:
        """Notes what a use of a parameter cell would have it be, and whether as a kernel."""
        if cell is None or len(cell) != 1:
            return
        unknown = next(iter(cell))
        if isinstance(unknown, int) and self.system.names[unknown]:
            self.system.suggestions.setdefault(unknown, []).append(wish)
            if kernel:
                self.system.kernels.add(unknown)

    def _short(self, cells: Cells) -> Cells:
        """Names long expressions."""
        if all(cell is None or len(cell) <= _LONG for cell in cells.flat):
            return cells
        named = cells.copy()
        for place in np.ndindex(cells.shape):
            if cells[place] is not None and len(cells[place]) > _LONG:
                unknown = self.system.unknown()
                long: Any = cells[place]
                self.system.require(plus(long, unknown, -1), "is named", None)
                named[place] = unknown
        return named

    def join(self, cells: Iterable[Cell], text: str, source: Source | None) -> Cell:
        """Requires that expressions agree; returns the shortest."""
        present = [cell for cell in cells if cell is not None]
        if not present:
            return None
        chosen = min(present, key=len)
        for cell in present:
            if cell is not chosen and cell != chosen:
                self.system.require(plus(cell, chosen, -1), text, source)
        return chosen

    def collapse(self, cells: Cells, eqn: Equation) -> Cell:
        """Joins all cells of a value whose structure an equation cannot follow."""
        text = f"`{eqn.name}` mixes parts of a dimension, which must agree"
        return self.join(cells.flat, text, eqn.source)

    def _regrouped(self, eqn: Equation, what: Regrouped) -> Cells:
        operand = [dim for group in what.operand for dim in group]
        result = [dim for group in what.result for dim in group]
        cells = self.cells(eqn.inputs[0], eqn.source)
        counts = [alternatives(dim) for dim in result]
        full = [alternatives(dim) for dim in operand]
        if cells.size == 1:
            return one_cell(cells.flat[0], len(result))
        if any(map(is_opaque, (*operand, *result))) or np.prod(full) != np.prod(counts):
            return one_cell(self.collapse(cells, eqn), len(result))
        return np.broadcast_to(cells, full).reshape(counts)

    def _blocks(self, eqn: Equation, what: Blocks) -> list[Cells]:
        if any(map(is_opaque, what.whole)):
            return self._mixed(eqn, what)
        spans = [list(itertools.accumulate(map(alternatives, p), initial=0)) for p in what.parts]
        boxes = [
            tuple(slice(span[i], span[i + 1]) for span, i in zip(spans, block.part, strict=True))
            for block in what.blocks
        ]
        full = [span[-1] for span in spans]
        if not what.pasted:
            whole = np.broadcast_to(self.cells(eqn.inputs[0], eqn.source), full)
            return [whole[box] for box in boxes]
        whole = np.empty(full, object)
        if what.filler:
            whole[...] = self.cells(eqn.inputs[-1], eqn.source).flat[0]
        for box, value in zip(boxes, eqn.inputs, strict=False):
            whole[box] = self.cells(value, eqn.source)
        return [whole]

    def _mixed(self, eqn: Equation, what: Blocks) -> list[Cells]:
        """All operands' cells joined, for a whole whose structure is not to be trusted."""
        cells = [cell for value in eqn.inputs for cell in self.cells(value, eqn.source).flat]
        text = f"`{eqn.name}` mixes parts of a dimension, which must agree"
        joined = self.join(cells, text, eqn.source)
        return [one_cell(joined, value.ndim) for value in eqn.outputs]
